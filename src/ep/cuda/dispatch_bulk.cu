// SPDX-License-Identifier: MIT
// Rows go through shared memory by bulk copies, which one thread of a warp drives: a mover. It
// finds the tokens that are for the ranks that its block serves, loads each row once, and stores it
// up to kFan times. The other warps of the block write the small columns meanwhile. Movers load
// while peers are waited for; those of rows that stay here do not wait at all.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "cuda/device/columns.cuh"
#include "cuda/device/order.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/dispatch_bulk.hpp"
#include "cuda/push_split.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

#ifdef EP_TUNE
#include "tune.hpp"
#endif

namespace {

/// Warps of a block: first the movers.
constexpr int kMostMovers = 16;
constexpr int kColumnWarps = 8;

/// Ranks that a row is stored at when it has been loaded.
#ifdef EP_FAN
constexpr int kFan = EP_FAN;
#else
constexpr int kFan = 2;
#endif

constexpr int kMostStages = 8;
/// Parts of rows begin with a whole line of memory, if rows do.
constexpr std::int64_t kPartGranule = 128;

struct BulkContext {
  PushArguments push;
  std::uint32_t stageBytes = 0;     ///< of all parts of a row but the last
  std::uint32_t lastPartBytes = 0;  ///< of the last
  std::int64_t numParts = 1;
  int numStages = 0;  ///< a mover's
  int numMovers = 1;  ///< a block's
#ifdef EP_TUNE
  Tune tune;
#endif
};

/// A part of a row on its way through shared memory.
struct Stage {
  std::uint64_t loaded;  ///< a barrier
  std::byte* out[kFan];
  std::uint32_t bytes;
};

struct BlockState {
  Stage stages[kMostMovers][kMostStages];
  std::uint64_t decided;  ///< a barrier: whether the peers are there is known
  bool entered;
  std::uint64_t epoch;  ///< 0: the operation has failed
  unsigned own;         ///< rows seen that stay here
  unsigned peers;       ///< rows seen that go elsewhere
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

#ifdef EP_TUNE
constexpr int kStoresAhead = EP_STORES_AHEAD;
#else
/// Stores of a mover that may be reading their stages when it loads into the next.
constexpr int kStoresAhead = 4;
#endif

/// Waits until it is known whether the peers are there.
__device__ __forceinline__ bool awaitEntry(BlockState& state) {
  awaitPhase(&state.decided, 0);
  return *static_cast<volatile bool*>(&state.entered);
}

/// A mover's stages, in turn: a part is loaded into one while parts in others are stored. Of one
/// thread.
class Ring {
 public:
  __device__ Ring(const BulkContext& context, BlockState& state, std::byte* buffers, int mover,
                  bool toPeers)
      : state_(state),
        stages_(state.stages[mover]),
        buffers_(buffers + static_cast<std::size_t>(mover) * context.numStages * context.stageBytes),
        stageBytes_(context.stageBytes),
        numStages_(context.numStages),
        asks_(toPeers) {}

  /// Copies bytes to all places `out` but null ones, some time.
  __device__ void feed(const std::byte* in, std::uint32_t bytes, std::byte* const (&out)[kFan]) {
    if (pending_ == numStages_ - kStoresAhead) store();
    bulkAwaitReads<kStoresAhead>();
    Stage& stage = stages_[head_.slot];
#pragma unroll
    for (int i = 0; i < kFan; ++i) stage.out[i] = out[i];
    stage.bytes = bytes;
    arriveExpecting(&stage.loaded, bytes);
    bulkLoad(bufferOf(head_.slot), in, bytes, &stage.loaded);
    advance(head_);
    ++pending_;
  }

  /// Ends when all is done.
  __device__ void drain() {
    while (pending_ > 0) store();
    bulkAwaitStores();
  }

 private:
  struct Position {
    int slot = 0;
    std::uint32_t parity = 0;
  };

  __device__ void advance(Position& position) const {
    if (++position.slot < numStages_) return;
    position.slot = 0;
    position.parity ^= 1;
  }

  __device__ std::byte* bufferOf(int slot) const {
    return buffers_ + static_cast<std::size_t>(slot) * stageBytes_;
  }

  /// False if a peer is not there, and nothing is to be written any more.
  __device__ bool mayStore() {
    if (asks_) {
      asks_ = false;
      open_ = awaitEntry(state_);
      // Peers have used what is written now, and said so by signals.
      fenceGlobalProxy();
    }
    return open_;
  }

  __device__ void store() {
    const bool open = mayStore();
    Stage& stage = stages_[tail_.slot];
    awaitPhase(&stage.loaded, tail_.parity);
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      std::byte* out = stage.out[i];
      if (open && out != nullptr) bulkStore(out, bufferOf(tail_.slot), stage.bytes);
    }
    bulkCommit();
    advance(tail_);
    --pending_;
  }

  BlockState& state_;
  Stage* stages_;
  std::byte* buffers_;
  std::uint32_t stageBytes_;
  int numStages_;
  bool asks_;
  bool open_ = true;
  Position head_;    ///< of the next load
  Position tail_;    ///< of the next store
  int pending_ = 0;  ///< loads whose stores have not begun
};

/// The tokens of a mover: every `step`-th from `first` on.
struct MoverShare {
  std::int64_t first = 0;
  std::int64_t step = 1;
  int firstRank = 0;  ///< of the ranks served, as numbered by rankAt()
  int lastRank = 0;   ///< one beyond
};

/// Shares the tokens of a group of blocks among its movers.
__device__ MoverShare shareOf(const BulkContext& context, const PushSplit& split, int mover) {
  const bool own = split.servesOwn(static_cast<int>(blockIdx.x));
  const bool peers = split.servesPeers(static_cast<int>(blockIdx.x));
  const int blocks = own ? split.ownBlocks : split.peerBlocks;
  const int block = static_cast<int>(blockIdx.x) - (peers ? 0 : split.blocks - split.ownBlocks);
  MoverShare share;
  share.first = static_cast<std::int64_t>(mover) * blocks + block;
  share.step = static_cast<std::int64_t>(blocks) * context.numMovers;
  share.firstRank = own ? 0 : 1;
  share.lastRank = peers ? context.push.numRanks : 1;
  return share;
}

/// Ranks in the order in which a mover serves them: this one, then the others, of which each block
/// begins with another one, so that no link is idle.
__device__ int rankAt(const Order& order, int index) {
  if (index == 0) return order.rank;
  const int turn = (index - 1 + static_cast<int>(blockIdx.x)) % (order.numRanks - 1);
  return (order.rank + 1 + turn) % order.numRanks;
}

/// Where the row of this lane's token goes.
struct RowPlaces {
  std::byte* at[kFan];
};

__device__ RowPlaces findPlaces(const PushArguments& push, const int (&ranks)[kFan],
                                std::int64_t token) {
  RowPlaces places = {};
  if (token >= push.numTokens) return places;
#pragma unroll
  for (int i = 0; i < kFan; ++i) {
    if (ranks[i] < 0) continue;
    const Receiver receiver(push, ranks[i]);
    const std::int64_t row = receiver.rowOf(token);
    std::byte* rows = receiver.column(kRows);
    if (row >= 0 && rows != nullptr) places.at[i] = rows + row * push.rowBytes;
  }
  return places;
}

__device__ void feedRow(const BulkContext& context, std::int64_t token, RowPlaces places,
                        Ring& ring) {
  const std::byte* in = context.push.rows + token * context.push.rowBytes;
  for (std::int64_t part = 0; part < context.numParts; ++part) {
    const bool last = part + 1 == context.numParts;
    ring.feed(in, last ? context.lastPartBytes : context.stageBytes, places.at);
    in += context.stageBytes;
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      if (places.at[i] != nullptr) places.at[i] += context.stageBytes;
    }
  }
}

/// Feeds the rows of the share's tokens that go to some of the ranks. Called by a warp, whose first
/// lane has the ring.
__device__ void feedRows(const BulkContext& context, const MoverShare& share,
                         const int (&ranks)[kFan], Ring& ring) {
  for (std::int64_t first = share.first; first < context.push.numTokens;
       first += kWarpSize * share.step) {
    const RowPlaces mine = findPlaces(context.push, ranks, first + laneIndex() * share.step);
    bool goes = false;
#pragma unroll
    for (int i = 0; i < kFan; ++i) goes = goes || mine.at[i] != nullptr;
    for (unsigned lanes = __ballot_sync(kAllLanes, goes); lanes != 0;) {
      const int lane = takeLowest(lanes);
      RowPlaces places;
#pragma unroll
      for (int i = 0; i < kFan; ++i) places.at[i] = broadcast(mine.at[i], lane);
      if (laneIndex() == 0) feedRow(context, first + lane * share.step, places, ring);
    }
  }
}

__device__ void moveRows(const BulkContext& context, const PushSplit& split, BlockState& state,
                         std::byte* buffers) {
  const int mover = static_cast<int>(threadIdx.x) / kWarpSize;
  const MoverShare share = shareOf(context, split, mover);
  Ring ring(context, state, buffers, mover, share.lastRank > 1);
  for (int index = share.firstRank; index < share.lastRank; index += kFan) {
    int ranks[kFan];
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      ranks[i] = index + i < share.lastRank ? rankAt(context.push.order, index + i) : -1;
    }
    feedRows(context, share, ranks, ring);
  }
  if (laneIndex() == 0) ring.drain();
  __syncwarp();
}

/// Tokens that are looked at to tell how many rows go where; fewer where each has many ranks.
constexpr int kSamples = 512;
constexpr int kHeadsSampled = 2048;

/// Counts, of some tokens all over, the rows that stay and those that go to peers. All blocks look
/// at the same ones. Called by the whole block.
__device__ void sampleLoad(const PushArguments& push, BlockState& state) {
  const int samples = min(kSamples, kHeadsSampled / push.numRanks + 1);
  const std::int64_t step = push.numTokens / samples + 1;
  unsigned own = 0;
  unsigned all = 0;
  for (std::int64_t token = threadIdx.x * step; token < push.numTokens; token += blockDim.x * step) {
    const std::int32_t* heads = push.head + token * push.numRanks;
    for (int rank = 0; rank < push.numRanks; ++rank) all += heads[rank] >= 0 ? 1 : 0;
    own += heads[push.order.rank] >= 0 ? 1 : 0;
  }
  own = __reduce_add_sync(kAllLanes, own);
  all = __reduce_add_sync(kAllLanes, all);
  if (laneIndex() == 0 && all != 0) {
    atomicAdd(&state.own, own);
    atomicAdd(&state.peers, all - own);
  }
}

/// Called by a thread.
__device__ void initState(const BulkContext& context, BlockState& state) {
  for (int mover = 0; mover < context.numMovers; ++mover) {
    for (int i = 0; i < context.numStages; ++i) initBarrier(&state.stages[mover][i].loaded, 1);
  }
  initBarrier(&state.decided, 1);
  state.own = 0;
  state.peers = 0;
  state.epoch = currentEpoch(context.push.order);
  state.entered = false;
  fenceBarrierInit();
}

/// Called by a warp of each block.
__device__ void enterAsWarp(const Order& order, BlockState& state) {
  const bool came = awaitAll(order, state.epoch, Word::entered);
  if (laneIndex() != 0) return;
  state.entered = came;
  arrive(&state.decided);
}

__device__ void pushInBulk(const BulkContext& context, BlockState& state, std::byte* buffers) {
  const PushArguments& push = context.push;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int columnWarp = warp - context.numMovers;
  sampleLoad(push, state);
  __syncthreads();
  const PushLoad load{static_cast<float>(state.own), static_cast<float>(state.peers)};
#ifdef EP_TUNE
  PushSplit split = splitBlocks(static_cast<int>(gridDim.x), load);
  if (context.tune.peerBlocks > 0)
    split = PushSplit{(int)gridDim.x, context.tune.peerBlocks, context.tune.ownBlocks};
#else
  const PushSplit split = splitBlocks(static_cast<int>(gridDim.x), load);
#endif
  if (columnWarp < 0) return moveRows(context, split, state, buffers);
  if (columnWarp == 0) enterAsWarp(push.order, state);
  if (!awaitEntry(state)) return;
  const int columnWarps = static_cast<int>(blockDim.x) / kWarpSize - context.numMovers;
  pushColumns(push, static_cast<int>(blockIdx.x) * columnWarps + columnWarp,
              static_cast<int>(gridDim.x) * columnWarps);
}

#endif

__global__ void __launch_bounds__((kMostMovers + kColumnWarps) * kWarpSize, 1)
    pushInBulkKernel(const __grid_constant__ BulkContext context) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte buffers[];
  __shared__ BlockState state;
  const Order& order = context.push.order;
  if (threadIdx.x == 0) initState(context, state);
  __syncthreads();
  bool fine = state.epoch != 0;
  if (fine) {
    // Before all else: peers wait for it.
    if (blockIdx.x == 0 && threadIdx.x / kWarpSize == context.numMovers) {
      raiseAll(order, state.epoch, Word::entered);
    }
    pushInBulk(context, state, buffers);
    __syncthreads();
    fine = state.entered && leavePeers(order);
  }
  if (!fine) poison(context.push.poison);
#endif
}

/// Rows shorter than this take longer by bulk copies than by plain ones.
constexpr std::int64_t kLeastRowBytes = 1024;
constexpr std::int64_t kMostPartBytes = 16 << 10;

constexpr std::int64_t roundUp(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// What the kernel may use of the shared memory of a multiprocessor for rows; 0 if the GPU has no
/// bulk copies.
std::int64_t prepareDevice(int device) {
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    EP_CUDA_TRY(cudaDeviceGetAttribute(&value, attribute, device), "cannot ask GPU ", device);
    return value;
  };
  if (get(cudaDevAttrComputeCapabilityMajor) < 9) return 0;
  const std::int64_t bytes = get(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
                             roundUp(sizeof(BlockState), kPartGranule) - kPartGranule;
  EP_CUDA_TRY(cudaFuncSetAttribute(pushInBulkKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)),
              "cannot use the shared memory of GPU ", device);
  return bytes;
}

/// Likewise, of the current GPU; asked once.
std::int64_t bytesForRows() {
  constexpr int kMostDevices = 64;
  static std::array<std::atomic<std::int64_t>, kMostDevices> known;  // one more than it is
  int device = 0;
  EP_CUDA_TRY(cudaGetDevice(&device), "cannot tell the current GPU");
  if (device >= kMostDevices) return prepareDevice(device);
  auto& bytes = known[static_cast<std::size_t>(device)];
  if (bytes.load() == 0) bytes.store(prepareDevice(device) + 1);
  return bytes.load() - 1;
}

bool plainCopiesWanted() {
  const char* value = std::getenv("MSCCLPP_EP_PLAIN_COPIES");
  return value != nullptr && std::string_view(value) == "1";
}

/// Cuts rows into equal parts, and gives the movers as many stages as there is room for.
BulkContext describe(const PushArguments& arguments, std::int64_t bytes) {
  BulkContext context;
  context.push = arguments;
  std::int64_t mostPart = kMostPartBytes;
  std::int64_t mostStages = kMostStages;
#ifdef EP_TUNE
  context.tune = gTune;
  context.numMovers = gTune.movers > 0 ? gTune.movers : static_cast<int>(std::min<std::int64_t>(kMostMovers, bytes / roundUp(std::min<std::int64_t>(arguments.rowBytes, kMostPartBytes), kPartGranule)));
  if (gTune.part > 0) mostPart = gTune.part;
  if (gTune.stages > 0) mostStages = gTune.stages;
#endif
  const std::int64_t parts = std::max<std::int64_t>((arguments.rowBytes + mostPart - 1) / mostPart, 1);
  const std::int64_t part = roundUp((arguments.rowBytes + parts - 1) / parts, kPartGranule);
  context.numParts = (arguments.rowBytes + part - 1) / part;
  context.stageBytes = static_cast<std::uint32_t>(part);
  context.lastPartBytes =
      static_cast<std::uint32_t>(arguments.rowBytes - (context.numParts - 1) * part);
  context.numStages =
      static_cast<int>(std::min<std::int64_t>(bytes / context.numMovers / part, mostStages));
  return context;
}

}  // namespace

bool canPushInBulk(const PushArguments& arguments) {
  return arguments.rowAlignment == 16 && arguments.rowBytes % 16 == 0 &&
         arguments.rowBytes >= kLeastRowBytes && !plainCopiesWanted() && bytesForRows() > 0;
}

void pushRowsInBulk(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  const BulkContext context = describe(arguments, bytesForRows());
  const std::int64_t most = arguments.numTokens * std::min(arguments.numRanks, 2);
  const auto blocks = static_cast<unsigned>(
      std::clamp<std::int64_t>(most, 1, std::max(numSms, 1)));
  const auto threads = static_cast<unsigned>((context.numMovers + kColumnWarps) * kWarpSize);
  const std::size_t shared =
      static_cast<std::size_t>(context.numMovers) * context.numStages * context.stageBytes;
  pushInBulkKernel<<<blocks, threads, shared, stream>>>(context);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes rows");
}

}  // namespace mscclpp_ep::cuda
