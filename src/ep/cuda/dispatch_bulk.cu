// SPDX-License-Identifier: MIT
// Rows go through shared memory by bulk copies. Each of a block's movers is a warp with a buffer:
// it finds tokens that go to some ranks, and one of its threads loads a row and stores it at up to
// kFan of them. That takes a thread about half a microsecond, however short the row, and the copies
// take longer; so there are as many movers as there is room for buffers. The other warps of the
// block write the small columns meanwhile. Movers begin to load while peers are waited for. All
// blocks do the same; what they hand to the link keeps to a schedule (link_pace.hpp).
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/layout.hpp"
#include "cuda/device/bulk_launch.cuh"
#include "cuda/device/columns.cuh"
#include "cuda/device/order.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/dispatch_bulk.hpp"
#include "cuda/kernel_list.hpp"
#include "cuda/link_pace.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

// Warps of a block: first the movers.
constexpr int kMostMovers = 16;
constexpr int kColumnWarps = 8;
constexpr int kMostWarps = kMostMovers + kColumnWarps;

/// Ranks that a row is stored at when it has been loaded.
constexpr int kFan = 2;

/// Buffers, and hence parts of rows, begin with a whole line of memory if rows do.
constexpr std::int64_t kPartGranule = 128;

struct BulkContext {
  PushArguments push;
  std::uint32_t partBytes = 0;      ///< of all parts of a row but the last
  std::uint32_t lastPartBytes = 0;  ///< of the last
  std::int64_t numParts = 1;
  int numMovers = 1;       ///< of a block
  float crossTime = 0.0F;  ///< nanoseconds that a row takes on the link; 0: rows go at will
};

/// What a block knows in common.
struct BlockState {
  std::uint64_t loaded[kMostMovers];  ///< barriers: a mover's buffer is full
  std::uint64_t decided;              ///< a barrier: whether the peers are there is known
  bool entered;                       ///< they are
  std::uint64_t start;                ///< when they were, by globalTimer()
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Where a row goes; null: nowhere.
struct RowPlaces {
  std::byte* at[kFan];
  float due;  ///< nanoseconds since the peers were there, before which it is not to be stored
};

/// Waits until it is known whether the peers are there.
__device__ __forceinline__ bool awaitEntry(BlockState& state) {
  awaitPhase(&state.decided, 0);
  return *static_cast<volatile bool*>(&state.entered);
}

/// Waits until something is due.
__device__ __forceinline__ void awaitDue(std::uint64_t start, float due) {
  if (due <= 0.0F) return;
  while (static_cast<float>(globalTimer() - start) < due) {
  }
}

/// A mover's buffer. Of one thread.
class Carrier {
 public:
  __device__ Carrier(BlockState& state, std::byte* buffer, int mover)
      : state_(state), buffer_(buffer), loaded_(&state.loaded[mover]) {}

  /// Copies to all places. Returns when the stores have begun.
  __device__ void carry(const std::byte* in, std::uint32_t bytes, const RowPlaces& places) {
    bulkAwaitReads<0>();
    arriveExpecting(loaded_, bytes);
    bulkLoad(buffer_, in, bytes, loaded_);
    if (!asked_) ask();
    awaitPhase(loaded_, parity_);
    parity_ ^= 1;
    if (!open_) return;
    awaitDue(start_, places.due);
#pragma unroll
    for (int i = 0; i < kFan; ++i) {
      if (places.at[i] != nullptr) bulkStore(places.at[i], buffer_, bytes);
    }
    bulkCommit();
  }

  /// Ends when all is done.
  __device__ void finish() { bulkAwaitStores(); }

 private:
  /// Learns whether the peers are there: if one is not, nothing is to be written.
  __device__ void ask() {
    asked_ = true;
    open_ = awaitEntry(state_);
    start_ = state_.start;
    // Peers have used what is written now, and said so by signals.
    fenceGlobalProxy();
  }

  BlockState& state_;
  std::byte* buffer_;
  std::uint64_t* loaded_;
  std::uint64_t start_ = 0;
  std::uint32_t parity_ = 0;
  bool asked_ = false;
  bool open_ = false;
};

/// Ranks in the order in which a block serves them: this one, then the others, of which each block
/// begins with another one, so that no link is idle.
__device__ int rankAt(const Order& order, int index) {
  if (index == 0) return order.rank;
  const int turn = (index - 1 + static_cast<int>(blockIdx.x)) % (order.numRanks - 1);
  return (order.rank + 1 + turn) % order.numRanks;
}

/// Rows for a rank. The caller sees this count, and may have written to it.
__device__ std::int32_t numSent(const PushArguments& push, int rank) {
  const std::int64_t sent = push.sent[rank];
  return static_cast<std::int32_t>(sent < 1 ? 1 : min(sent, push.numTokens));
}

/// How long the rows for peers take on the link. Called by a warp.
__device__ float linkTime(const BulkContext& context) {
  if (context.crossTime <= 0.0F) return 0.0F;
  const PushArguments& push = context.push;
  unsigned rows = 0;
  for (int rank = laneIndex(); rank < push.numRanks; rank += kWarpSize) {
    if (rank != push.order.rank) rows += static_cast<unsigned>(numSent(push, rank));
  }
  return static_cast<float>(__reduce_add_sync(kAllLanes, rows)) * context.crossTime;
}

/// Some ranks whose rows are carried at a time, and the schedule of those for peers.
struct Pass {
  int ranks[kFan];     ///< negative: none
  float begin;         ///< when the first row is due
  float end;           ///< when all are
  float perRow[kFan];  ///< and how much later each next one for a rank; 0: at once
};

/// The pass of the ranks from `index` on, as rankAt() numbers them. Each peer gets an equal part of
/// the time.
__device__ Pass describePass(const PushArguments& push, int index, float linkTime) {
  const int last = min(index + kFan, push.numRanks);
  const int before = max(index - 1, 0);  // peers, without this rank
  const float part = linkTime / static_cast<float>(max(push.numRanks - 1, 1));
  const float span = static_cast<float>(last - 1 - before) * part;
  Pass pass;
  pass.begin = static_cast<float>(before) * part;
  pass.end = pass.begin + span;
#pragma unroll
  for (int i = 0; i < kFan; ++i) {
    pass.ranks[i] = index + i < last ? rankAt(push.order, index + i) : -1;
    pass.perRow[i] = 0.0F;
    if (span <= 0.0F || index + i == 0 || index + i >= last) continue;
    pass.perRow[i] = span / static_cast<float>(numSent(push, pass.ranks[i]));
  }
  return pass;
}

/// Where a token's row goes in a pass, and when.
__device__ RowPlaces findPlaces(const PushArguments& push, const Pass& pass, std::int64_t token) {
  RowPlaces places = {};
  if (token >= push.numTokens) return places;
#pragma unroll
  for (int i = 0; i < kFan; ++i) {
    if (pass.ranks[i] < 0) continue;
    const Receiver receiver(push, pass.ranks[i]);
    const std::int32_t ordinal = receiver.ordinalOf(token);
    const std::int64_t row = receiver.rowAt(ordinal);
    std::byte* rows = receiver.column(kRows);
    if (row < 0 || rows == nullptr) continue;
    places.at[i] = rows + row * push.rowBytes;
    if (pass.perRow[i] > 0.0F) {
      places.due = fminf(pass.begin + static_cast<float>(ordinal) * pass.perRow[i], pass.end);
    }
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

/// Carries the rows of every `step`-th token from `first` on. Called by a warp, whose first lane
/// carries.
__device__ void carryRows(const BulkContext& context, const Pass& pass, std::int64_t first,
                          std::int64_t step, Carrier& carrier) {
  for (; first < context.push.numTokens; first += kWarpSize * step) {
    const RowPlaces mine = findPlaces(context.push, pass, first + laneIndex() * step);
    bool goes = false;
#pragma unroll
    for (int i = 0; i < kFan; ++i) goes = goes || mine.at[i] != nullptr;
    for (unsigned lanes = __ballot_sync(kAllLanes, goes); lanes != 0;) {
      const int lane = takeLowest(lanes);
      RowPlaces places;
#pragma unroll
      for (int i = 0; i < kFan; ++i) places.at[i] = broadcast(mine.at[i], lane);
      places.due = __shfl_sync(kAllLanes, mine.due, lane);
      if (laneIndex() == 0) carryRow(context, first + lane * step, places, carrier);
    }
  }
}

/// What a mover does: its share of the tokens, for all ranks.
__device__ void moveRows(const BulkContext& context, BlockState& state, std::byte* buffers,
                         int mover) {
  Carrier carrier(state, buffers + static_cast<std::size_t>(mover) * context.partBytes, mover);
  const std::int64_t blocks = gridDim.x;
  const float time = linkTime(context);
  for (int index = 0; index < context.push.numRanks; index += kFan) {
    carryRows(context, describePass(context.push, index, time), mover * blocks + blockIdx.x,
              blocks * context.numMovers, carrier);
  }
  if (laneIndex() == 0) carrier.finish();
  __syncwarp();
}

/// Called by the block's first thread.
__device__ void initState(const BulkContext& context, BlockState& state) {
  for (int mover = 0; mover < context.numMovers; ++mover) initBarrier(&state.loaded[mover], 1);
  initBarrier(&state.decided, 1);
  state.entered = false;
  fenceBarrierInit();
}

/// Lets peers reach into this rank's memory, which they wait for, and waits for them. Called by a
/// warp of each block.
__device__ void enter(const Order& order, BlockState& state) {
  const std::uint64_t epoch = currentEpoch(order);
  bool came = epoch != 0;
  if (came) {
    if (blockIdx.x == 0) raiseAll(order, epoch, Word::entered);
    came = awaitAll(order, epoch, Word::entered);
  }
  __syncwarp();  // what every lane has seen comes before what lane 0 tells the block
  if (laneIndex() != 0) return;
  state.entered = came;
  state.start = globalTimer();
  arrive(&state.decided);
}

/// Columns go with the rows, but are done before these are.
constexpr float kColumnsLead = 0.8F;

__device__ void writeColumns(const BulkContext& context, BlockState& state, int warp) {
  if (warp == 0) enter(context.push.order, state);
  // Not by a warp that others wait for.
  if (warp == kColumnWarps - 1 && blockIdx.x == 0) {
    bringCounts(context.push.hostCounts, laneIndex(), kWarpSize);
  }
  const float time = kColumnsLead * linkTime(context);
  if (!awaitEntry(state)) return;
  const std::uint64_t start = state.start;
  pushColumns(context.push, static_cast<int>(blockIdx.x) * kColumnWarps + warp,
              static_cast<int>(gridDim.x) * kColumnWarps,
              [=](float fraction) { awaitDue(start, fraction * time); });
}

/// As the kernel; false if the operation has failed.
__device__ bool pushInBulk(const BulkContext& context, BlockState& state, std::byte* buffers) {
  const PushArguments& push = context.push;
  if (threadIdx.x == 0) initState(context, state);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp < context.numMovers) {
    moveRows(context, state, buffers, warp);
  } else {
    writeColumns(context, state, warp - context.numMovers);
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

/// Shorter rows are no slower by plain copies, which keep to no schedule on a link.
constexpr std::int64_t kLeastRowBytes = 4 << 10;
constexpr std::int64_t kLeastLinkedRowBytes = 1 << 10;
/// Of longer ones, too few would be on their way at a time.
constexpr std::int64_t kMostPartBytes = 16 << 10;

/// Buffers of all blocks that keep the link busy; with many more the last rows come late.
constexpr std::int64_t kLinkBuffers = 2 << 20;
constexpr std::int64_t kLeastMovers = 4;

/// Shared memory that the kernel declares, and that aligning the buffers costs, at most.
constexpr int kOtherSharedBytes =
    static_cast<int>(roundUp(sizeof(BlockState), kPartGranule) + kPartGranule);

/// What goes with a row.
std::int64_t columnBytes(const PushArguments& arguments) {
  const std::int64_t idBytes = arguments.topk.wide ? sizeof(std::int64_t) : sizeof(std::int32_t);
  std::int64_t bytes = sizeof(std::int32_t);  // its number
  if (arguments.topk.ids != nullptr) bytes += arguments.topk.topk * idBytes;
  if (arguments.topk.weights != nullptr) bytes += arguments.topk.topk * std::int64_t{sizeof(float)};
  if (arguments.scales.data == nullptr) return bytes;
  return bytes + arguments.scales.perToken * arguments.scales.elementBytes;
}

/// Cuts rows into equal parts that fit into a buffer.
BulkContext describe(const PushArguments& arguments, std::int64_t blocks) {
  const std::int64_t row = std::max<std::int64_t>(arguments.rowBytes, 1);
  const std::int64_t parts = divideUp(row, kMostPartBytes);
  const std::int64_t part = roundUp(divideUp(row, parts), kPartGranule);
  BulkContext context;
  context.push = arguments;
  context.numParts = divideUp(row, part);
  context.partBytes = static_cast<std::uint32_t>(part);
  context.lastPartBytes = static_cast<std::uint32_t>(row - (context.numParts - 1) * part);
  context.numMovers = static_cast<int>(
      std::min<std::int64_t>(sharedBytesBeside<kOtherSharedBytes>() / part, kMostMovers));
  if (arguments.order.linked && arguments.sent != nullptr) {
    context.crossTime =
        nanosecondsToCross(row + columnBytes(arguments), deviceLimits().computeCapability);
  }
  if (context.crossTime > 0.0F) {
    const auto enough = static_cast<int>(std::max(kLinkBuffers / (blocks * part), kLeastMovers));
    context.numMovers = std::min(context.numMovers, enough);
  }
  return context;
}

}  // namespace

bool canPushInBulk(const PushArguments& arguments) {
  // In one memory plain copies read a row once for any number of ranks, which is less work.
  const bool linked = arguments.order.linked;
  if (!linked && arguments.numRanks > kFan) return false;
  return arguments.rowAlignment == 16 && arguments.rowBytes % 16 == 0 &&
         arguments.rowBytes >= (linked ? kLeastLinkedRowBytes : kLeastRowBytes) && canCopyInBulk();
}

void pushRowsInBulk(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  // With more blocks than tokens, some would have nothing to do.
  const auto blocks = std::clamp<std::int64_t>(arguments.numTokens, 1, std::max(numSms, 1));
  const BulkContext context = describe(arguments, blocks);
  const int threads = (context.numMovers + kColumnWarps) * kWarpSize;
  const int bytes = context.numMovers * static_cast<int>(context.partBytes);
  EP_LIST_KERNEL(pushInBulkKernel, sharedBytesBeside<kOtherSharedBytes>);
  pushInBulkKernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                     static_cast<std::size_t>(bytes), stream>>>(context);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes rows");
}

}  // namespace mscclpp_ep::cuda
