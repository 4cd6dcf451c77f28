// SPDX-License-Identifier: MIT
// Rows go through shared memory by bulk copies. Each of a block's movers is a warp with a buffer:
// it finds tokens that go to the ranks that its block serves, and one of its threads loads a row
// and stores it at up to kFan ranks. That takes a thread about half a microsecond, however short
// the row, and the copies take longer; so there are as many movers as there is room for buffers.
// The other warps of the block write the small columns meanwhile. Movers begin to load while peers
// are waited for; those of rows that stay here do not wait for peers at all.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device/bulk_launch.cuh"
#include "cuda/device/columns.cuh"
#include "cuda/device/order.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/dispatch_bulk.hpp"
#include "cuda/kernel_list.hpp"
#include "cuda/push_split.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

// Warps of a block: first the movers.
constexpr int kMostMovers = 16;
constexpr int kColumnWarps = 8;
constexpr int kMostWarps = kMostMovers + kColumnWarps;

/// Buffers, and hence parts of rows, begin with a whole line of memory if rows do.
constexpr std::int64_t kPartGranule = 128;

struct BulkContext {
  PushArguments push;
  std::uint32_t partBytes = 0;      ///< of all parts of a row but the last
  std::uint32_t lastPartBytes = 0;  ///< of the last
  std::int64_t numParts = 1;
  int numMovers = 1;  ///< of a block
};

/// What a block knows in common.
struct BlockState {
  std::uint64_t loaded[kMostMovers];  ///< barriers: a mover's buffer is full
  std::uint64_t decided;              ///< a barrier: whether the peers are there is known
  bool entered;                       ///< they are
  std::uint64_t epoch;                ///< 0: the operation has failed
  unsigned own[kMostWarps];           ///< rows that a warp has seen that stay here
  unsigned peers[kMostWarps];         ///< rows that it has seen that go elsewhere
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Ranks that a row is stored at when it has been loaded.
constexpr int kFan = 2;

/// Where a row goes; null: nowhere.
struct RowPlaces {
  std::byte* at[kFan];
};

/// Waits until it is known whether the peers are there.
__device__ __forceinline__ bool awaitEntry(BlockState& state) {
  awaitPhase(&state.decided, 0);
  return *static_cast<volatile bool*>(&state.entered);
}

/// A mover's buffer. Of one thread.
class Carrier {
 public:
  __device__ Carrier(BlockState& state, std::byte* buffer, int mover, bool servesPeers)
      : state_(state), buffer_(buffer), loaded_(&state.loaded[mover]), asks_(servesPeers) {}

  /// Copies to all places. Returns when the stores have begun.
  __device__ void carry(const std::byte* in, std::uint32_t bytes, const RowPlaces& places) {
    bulkAwaitReads<0>();
    arriveExpecting(loaded_, bytes);
    bulkLoad(buffer_, in, bytes, loaded_);
    const bool open = mayStore();
    awaitPhase(loaded_, parity_);
    parity_ ^= 1;
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      if (open && places.at[i] != nullptr) bulkStore(places.at[i], buffer_, bytes);
    }
    bulkCommit();
  }

  /// Ends when all is done.
  __device__ void finish() { bulkAwaitStores(); }

 private:
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

  BlockState& state_;
  std::byte* buffer_;
  std::uint64_t* loaded_;
  std::uint32_t parity_ = 0;
  bool asks_;
  bool open_ = true;
};

/// What a mover does: every `step`-th token from `first` on, for the ranks `firstRank` to
/// `lastRank` - 1, as rankAt() numbers them.
struct MoverShare {
  std::int64_t first = 0;
  std::int64_t step = 1;
  int firstRank = 0;
  int lastRank = 0;
};

/// Shares the tokens among the movers of all blocks that serve the same ranks as this one.
__device__ MoverShare shareOf(const BulkContext& context, const PushSplit& split, int mover) {
  const auto block = static_cast<int>(blockIdx.x);
  const bool own = split.servesOwn(block);
  const bool peers = split.servesPeers(block);
  const int blocks = own ? split.ownBlocks : split.peerBlocks;
  MoverShare share;
  share.first =
      static_cast<std::int64_t>(mover) * blocks + (peers ? block : block - split.peerBlocks);
  share.step = static_cast<std::int64_t>(blocks) * context.numMovers;
  share.firstRank = own ? 0 : 1;
  share.lastRank = peers ? context.push.numRanks : 1;
  return share;
}

/// Ranks in the order in which a block serves them: this one, then the others, of which each block
/// begins with another one, so that no link is idle.
__device__ int rankAt(const Order& order, int index) {
  if (index == 0) return order.rank;
  const int turn = (index - 1 + static_cast<int>(blockIdx.x)) % (order.numRanks - 1);
  return (order.rank + 1 + turn) % order.numRanks;
}

/// Where a token's row goes at some ranks, of which negative ones are none.
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

__device__ void carryRow(const BulkContext& context, std::int64_t token, RowPlaces places,
                         Carrier& carrier) {
  const std::byte* in = context.push.rows + token * context.push.rowBytes;
  for (std::int64_t left = context.numParts; left > 1; --left) {
    carrier.carry(in, context.partBytes, places);
    in += context.partBytes;
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      if (places.at[i] != nullptr) places.at[i] += context.partBytes;
    }
  }
  carrier.carry(in, context.lastPartBytes, places);
}

/// Carries the rows of the share's tokens that go to some ranks. Called by a warp, whose first lane
/// carries.
__device__ void carryRows(const BulkContext& context, const MoverShare& share,
                          const int (&ranks)[kFan], Carrier& carrier) {
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
      if (laneIndex() == 0) carryRow(context, first + lane * share.step, places, carrier);
    }
  }
}

__device__ void moveRows(const BulkContext& context, const PushSplit& split, BlockState& state,
                         std::byte* buffers, int mover) {
  const MoverShare share = shareOf(context, split, mover);
  Carrier carrier(state, buffers + static_cast<std::size_t>(mover) * context.partBytes, mover,
                  share.lastRank > 1);
  for (int index = share.firstRank; index < share.lastRank; index += kFan) {
    int ranks[kFan];
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      ranks[i] = index + i < share.lastRank ? rankAt(context.push.order, index + i) : -1;
    }
    carryRows(context, share, ranks, carrier);
  }
  if (laneIndex() == 0) carrier.finish();
  __syncwarp();
}

/// Called by the block's first thread.
__device__ void initState(const BulkContext& context, BlockState& state) {
  for (int mover = 0; mover < context.numMovers; ++mover) initBarrier(&state.loaded[mover], 1);
  initBarrier(&state.decided, 1);
  state.entered = false;
  state.epoch = currentEpoch(context.push.order);
  fenceBarrierInit();
}

/// Tokens that are looked at to tell how many rows go where; fewer where each has many ranks.
constexpr int kSamples = 512;
constexpr int kHeadsSampled = 2048;

/// Counts, of some tokens all over, the rows that stay and those that go to peers. All blocks look
/// at the same ones. Called by all warps.
__device__ void sampleLoad(const PushArguments& push, BlockState& state, int warp) {
  const int samples = min(kSamples, kHeadsSampled / push.numRanks + 1);
  const std::int64_t step = push.numTokens / samples + 1;
  unsigned own = 0;
  unsigned all = 0;
  for (std::int64_t token = threadIdx.x * step; token < push.numTokens;
       token += blockDim.x * step) {
    const std::int32_t* heads = push.head + token * push.numRanks;
    for (int rank = 0; rank < push.numRanks; ++rank) all += heads[rank] >= 0 ? 1 : 0;
    own += heads[push.order.rank] >= 0 ? 1 : 0;
  }
  own = __reduce_add_sync(kAllLanes, own);
  all = __reduce_add_sync(kAllLanes, all);
  if (laneIndex() != 0) return;
  state.own[warp] = own;
  state.peers[warp] = all - own;
}

__device__ PushSplit chooseSplit(const BlockState& state) {
  unsigned own = 0;
  unsigned peers = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) {
    own += state.own[warp];
    peers += state.peers[warp];
  }
  return splitBlocks(static_cast<int>(gridDim.x),
                     {static_cast<float>(own), static_cast<float>(peers)});
}

/// Lets peers reach into this rank's memory. Called by a warp, first of all: they wait for it.
__device__ void raiseEntered(const Order& order) {
  const std::uint64_t epoch = currentEpoch(order);
  if (epoch != 0) raiseAll(order, epoch, Word::entered);
}

/// Waits for the peers. Called by a warp of each block.
__device__ void decideEntry(const Order& order, BlockState& state) {
  const bool came = awaitAll(order, state.epoch, Word::entered);
  __syncwarp();  // what every lane has seen comes before what lane 0 tells the block
  if (laneIndex() != 0) return;
  state.entered = came;
  arrive(&state.decided);
}

__device__ void writeColumns(const BulkContext& context, BlockState& state, int warp) {
  if (warp == 0) decideEntry(context.push.order, state);
  if (!awaitEntry(state)) return;
  pushColumns(context.push, static_cast<int>(blockIdx.x) * kColumnWarps + warp,
              static_cast<int>(gridDim.x) * kColumnWarps);
}

/// As the kernel; false if the operation has failed.
__device__ bool pushInBulk(const BulkContext& context, BlockState& state, std::byte* buffers) {
  const PushArguments& push = context.push;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int columnWarp = warp - context.numMovers;
  if (columnWarp == 0 && blockIdx.x == 0) raiseEntered(push.order);
  if (threadIdx.x == 0) initState(context, state);
  sampleLoad(push, state, warp);
  __syncthreads();
  if (state.epoch == 0) return false;
  if (columnWarp < 0) {
    moveRows(context, chooseSplit(state), state, buffers, warp);
  } else {
    writeColumns(context, state, columnWarp);
  }
  __syncthreads();
  return state.entered && leavePeers(push.order);
}

#endif

__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    pushInBulkKernel(const __grid_constant__ BulkContext context) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte buffers[];
  __shared__ BlockState state;
  if (!pushInBulk(context, state, buffers)) poison(context.push.poison);
#endif
}

/// Shorter rows are no slower by plain copies.
constexpr std::int64_t kLeastRowBytes = 4 << 10;
/// Of longer ones, too few would be on their way at a time.
constexpr std::int64_t kMostPartBytes = 16 << 10;

constexpr std::int64_t roundUp(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// What a block can have of shared memory for buffers.
std::int64_t bytesForBuffers() {
  return deviceLimits().sharedBytes - roundUp(sizeof(BlockState), kPartGranule) - kPartGranule;
}

/// Cuts rows into equal parts that fit into a buffer.
BulkContext describe(const PushArguments& arguments) {
  const std::int64_t row = std::max<std::int64_t>(arguments.rowBytes, 1);
  const std::int64_t parts = (row + kMostPartBytes - 1) / kMostPartBytes;
  const std::int64_t part = roundUp((row + parts - 1) / parts, kPartGranule);
  BulkContext context;
  context.push = arguments;
  context.numParts = (row + part - 1) / part;
  context.partBytes = static_cast<std::uint32_t>(part);
  context.lastPartBytes = static_cast<std::uint32_t>(row - (context.numParts - 1) * part);
  context.numMovers =
      static_cast<int>(std::min<std::int64_t>(bytesForBuffers() / part, kMostMovers));
  return context;
}

}  // namespace

bool canPushInBulk(const PushArguments& arguments) {
  return arguments.rowAlignment == 16 && arguments.rowBytes % 16 == 0 &&
         arguments.rowBytes >= kLeastRowBytes && canCopyInBulk();
}

void pushRowsInBulk(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  const BulkContext context = describe(arguments);
  // With more blocks than rows, some would have nothing to do.
  const std::int64_t rows = arguments.numTokens * std::min(arguments.numRanks, 2);
  const auto blocks = std::clamp<std::int64_t>(rows, 1, std::max(numSms, 1));
  const int threads = (context.numMovers + kColumnWarps) * kWarpSize;
  const int bytes = context.numMovers * static_cast<int>(context.partBytes);
  allowSharedBytes(pushInBulkKernel, bytes);
  EP_LIST_KERNEL(pushInBulkKernel);
  pushInBulkKernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                     static_cast<std::size_t>(bytes), stream>>>(context);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes rows");
}

}  // namespace mscclpp_ep::cuda
