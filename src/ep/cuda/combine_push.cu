// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/combine_push.hpp"
#include "cuda/device/bulk_launch.cuh"
#include "cuda/device/bulk_push.cuh"
#include "cuda/device/bulk_sum.cuh"
#include "cuda/device/chunks.cuh"
#include "cuda/device/order.cuh"
#include "cuda/device/slices.cuh"
#include "cuda/device/sum_weights.cuh"
#include "cuda/device/summands.cuh"
#include "cuda/device/visit.cuh"
#include "cuda/kernel_list.hpp"
#include "transport/cuda_check.hpp"

// Why a kernel that waits for rows of its peers ends. Blocks and warps have roles. Those that push
// wait for nothing but their own copies, and that all ranks have begun; those that sum wait for
// flags, and nothing that pushes waits for those that sum. Blocks draw the chunks that they push,
// and warps the weights, before they sum any: so all that a rank pushes is pushed, and flagged,
// once one of its pushing blocks runs, whether the others do or not; each of these has only to draw
// that there is no more. Thus whoever waits for a flag of rank B waits for one pushing block of B
// to be on its GPU. These have the lowest indices, and GPUs start blocks in this order: the first
// block of B to run pushes, and it runs no later than block 0, for whose word all that push wait.
// What is needed is therefore no more than for any kernel that waits for its peers to begin: that
// the first block of each rank runs while all blocks of the other ranks on its GPU do, and hold
// their multiprocessors. If n ranks of b blocks share a GPU on which c such blocks fit at a time,
// this is (n - 1) * b < c. Eight ranks of 20 blocks do not fit onto 132 multiprocessors so: they
// have to have at most 18, whichever kernel it is. With 17 or 18 not all blocks are there at once,
// and yet all rows land: the blocks that are there push for those that are not, sum, and end, and
// make room for them. A rank ends when all ranks have pushed all, so none is an epoch ahead of a
// block that has still to begin. Whatever does not hold, waits are bounded.

namespace mscclpp_ep::cuda {

namespace {

// By bulk copies.

/// How many of the blocks push, and which sum; some may do both.
struct PushSumShape {
  int blocks = 1;
  int pushers = 1;              ///< the first so many
  int firstSummer = 0;          ///< this one and those behind it
  std::int32_t pieceBytes = 0;  ///< of what is pushed
};

// Long pieces, as each takes some time whatever its length; but beside the stages of sums there is
// little room, and more blocks that do both would push more than the link carries. Then sums cannot
// get to their memory past what waits for the link: with fewer pieces on their way that is avoided.
constexpr std::int32_t kPieceBytes = 28 << 10;
constexpr std::int32_t kSharedPieceBytes = 8 << 10;
constexpr std::int32_t kPacedPieceBytes = 16 << 10;

/// Nine blocks push what the link carries, as measured on H200 over NVLink 4. If the others can sum
/// as fast, each block has one role; else all blocks do both, so that they are busy to the end.
PushSumShape pushSumShape(int numSms, int numRanks) {
  constexpr int kLeastPushers = 9;
  constexpr int kBlocksPerPusher = 8;  ///< where there are many
  constexpr int kMostUnpaced = 17;
  // Two ranks sum two rows for each that they push; with more ranks it tends to one.
  const int leastSummers = numRanks <= 2 ? 13 : 8;
  const int blocks = std::max(numSms, 1);
  if (blocks < kLeastPushers + leastSummers) {
    return {blocks, blocks, 0, blocks <= kMostUnpaced ? kSharedPieceBytes : kPacedPieceBytes};
  }
  const int pushers = std::max(blocks / kBlocksPerPusher, kLeastPushers);
  return {blocks, pushers, pushers, kPieceBytes};
}

/// How many places the rings of a block have, if it has one of them or both.
struct RingSizes {
  int stages[2] = {};           ///< of rows to be summed, a pipe: alone, and beside pieces
  int pieces[2] = {};           ///< to be pushed: alone, and beside stages
  std::int64_t stageBytes = 0;  ///< of all stages that are beside pieces
};

/// What blocks begin with comes first, as parameters take long to come.
struct BulkPushSum {
  PushSumShape shape;
  RingSizes sizes;
  BulkSum sum;
  BulkPush push;
};

constexpr int kBulkWarps = kPipes * kPipeWarps + kPushWarps + kWeightWarps;
constexpr int kBulkThreads = kBulkWarps * kWarpSize;
constexpr int kOtherSharedBytes = 6144;  ///< for barriers and the like

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

struct BlockRings {
  SumRing sums[kPipes];
  PushRing push;
};

/// The roles of a block.
struct BlockRoles {
  bool pushes;
  bool sums;

  __device__ explicit BlockRoles(const PushSumShape& shape)
      : pushes(static_cast<int>(blockIdx.x) < shape.pushers),
        sums(static_cast<int>(blockIdx.x) >= shape.firstSummer) {}
  __device__ bool both() const { return pushes && sums; }
};

/// The roles of a block's warps, in this order: pipes, those that push, those that sum weights.
template <class Element>
__device__ void runRole(const BulkPushSum& all, const BlockRoles& roles, std::uint64_t epoch,
                        BlockRings& rings, std::byte* shared) {
  const std::int64_t block = static_cast<int>(blockIdx.x) - all.shape.firstSummer;
  const std::int64_t blocks = all.shape.blocks - all.shape.firstSummer;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int pushWarp = warp - kPipes * kPipeWarps;
  const Order& order = all.sum.context.order;
  // The warps that raise flags, in blocks that push none, too, and those of weights.
  const unsigned parts = gridDim.x * (1 + (all.sum.context.topk > 0 ? kWeightWarps : 0));
  if (pushWarp < 0) {
    if (roles.sums) {
      runPipe<Element, true>(all.sum, block, blocks, epoch, rings.sums, shared, warp);
    }
  } else if (pushWarp < kPushWarps) {
    // Behind the stages, if there are any.
    std::byte* pieces = shared + (roles.sums ? all.sizes.stageBytes : 0);
    if (roles.pushes) pushChunks(all.push, order, epoch, rings.push, pieces, pushWarp);
    if (pushWarp != kPushWarps - 1) return;
    if (!roles.pushes) awaitPeers(order, epoch);
    finishPart(order, epoch, parts);
  } else {
    const bool entered = awaitPeers(order, epoch);
    if (entered) pushWeights(all.push.context, epoch);
    finishPart(order, epoch, parts);
    if (!roles.sums || !entered) return;
    const std::int64_t numTokens = all.sum.parts.numItems / all.sum.parts.perRow;
    sumWeights<true>(all.sum.context, ItemRange::of(numTokens, block, blocks), epoch,
                     (pushWarp - kPushWarps) * kWarpSize + laneIndex(), kWeightWarps * kWarpSize);
  }
}

#endif

template <class Element>
__global__ void __launch_bounds__(kBulkThreads, 1)
    bulkPushSumKernel(const __grid_constant__ BulkPushSum all) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ BlockRings rings;
  const Order& order = all.sum.context.order;
  const BlockRoles roles(all.shape);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp < kPipes) rings.sums[warp].init(all.sizes.stages[roles.both()]);
  if (warp == kPipes) rings.push.init(all.sizes.pieces[roles.both()]);
  if (warp <= kPipes) fenceBarrierInit();
  const std::uint64_t epoch = beginVisit(order);
  if (epoch == 0) return;
  runRole<Element>(all, roles, epoch, rings, shared);
  endVisit(order);
#endif
}

int placesIn(std::int64_t bytes, std::int64_t placeBytes, int most) {
  return static_cast<int>(std::min<std::int64_t>(bytes / placeBytes, most));
}

/// Beside each other, the rings get about half of the memory each.
RingSizes ringSizes(std::int64_t room, std::int64_t partBytes, std::int64_t pieceBytes) {
  const std::int64_t stages = kPipes * partBytes;  // one of each pipe
  RingSizes sizes;
  sizes.stages[0] = placesIn(room, stages, kMostStages);
  sizes.pieces[0] = placesIn(room, pieceBytes, kMostPieces);
  sizes.stages[1] = placesIn(room / 2 + stages / 2, stages, kMostStages);
  sizes.stageBytes = sizes.stages[1] * stages;
  sizes.pieces[1] = placesIn(room - sizes.stageBytes, pieceBytes, kMostPieces);
  return sizes;
}

template <class Element>
void launchBulk(const PushSumArguments& arguments, const PushSumShape& shape, cudaStream_t stream) {
  BulkPushSum all;
  all.sum.context = describeSum(arguments.sum);
  const std::int64_t rowBytes = all.sum.context.rows.rowBytes;
  all.sum.context.landing = {arguments.flags, static_cast<std::int32_t>(arguments.chunkRows)};
  all.sum.parts = cutIntoParts(arguments.sum.numTokens, rowBytes, shape.blocks - shape.firstSummer);
  all.push.context = describePush(arguments, rowBytes, shape.pushers, shape.blocks * kWeightWarps);
  all.push.pieceBytes = shape.pieceBytes;
  all.shape = shape;
  const std::int64_t room = sharedBytesBeside<kOtherSharedBytes>();
  all.sizes = ringSizes(room, all.sum.parts.partBytes, all.push.pieceBytes);
  const int warps = kPipes * kPipeWarps + kPushWarps + (arguments.sum.topk > 0 ? kWeightWarps : 0);
  EP_LIST_KERNEL(bulkPushSumKernel<Element>, sharedBytesBeside<kOtherSharedBytes>);
  bulkPushSumKernel<Element>
      <<<static_cast<unsigned>(shape.blocks), warps * kWarpSize, static_cast<int>(room), stream>>>(
          all);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes and sums rows");
}

// By plain copies: in every block, some warps push and the others sum.

constexpr int kPlainPushWarps = 8;
constexpr int kPlainPushThreads = kPlainPushWarps * kWarpSize;
constexpr int kPlainSumWarps = 12;  ///< more, and a thread would have too few registers
constexpr int kPlainThreads = (kPlainPushWarps + kPlainSumWarps) * kWarpSize;
constexpr int kPlainCopyAhead = 8;

struct PlainPushSum {
  SumContext context;
  Slices slices;
  PushContext push;
};

/// Copies what many threads copy together.
template <class Vector>
__device__ void copyTogether(const std::byte* from, std::byte* to, std::int64_t bytes, int thread) {
  const auto* in = reinterpret_cast<const Vector*>(from);
  auto* out = reinterpret_cast<Vector*>(to);
  const std::int64_t count = bytes / static_cast<std::int64_t>(sizeof(Vector));
  for (std::int64_t at = thread; at < count; at += kPlainCopyAhead * kPlainPushThreads) {
    Vector vectors[kPlainCopyAhead];
#pragma unroll
    for (int i = 0; i < kPlainCopyAhead; ++i) {
      if (at + i * kPlainPushThreads < count) vectors[i] = __ldcs(in + at + i * kPlainPushThreads);
    }
#pragma unroll
    for (int i = 0; i < kPlainCopyAhead; ++i) {
      if (at + i * kPlainPushThreads < count) __stcs(out + at + i * kPlainPushThreads, vectors[i]);
    }
  }
}

__device__ void awaitPushers() { syncThreads(1, kPlainPushThreads); }

template <class Vector>
__device__ void pushPlainly(const PushContext& push, std::uint64_t epoch, std::int64_t& drawn,
                            int thread) {
  const PushPlan<Landed::rows> plan(push);
  for (;;) {
    if (thread == 0) drawn = plan.draw();
    awaitPushers();
    const std::int64_t ticket = drawn;
    if (ticket >= plan.count()) {
      if (thread == 0) plan.end(ticket);
      return;
    }
    const Chunks chunk = plan[ticket];
    copyTogether<Vector>(chunk.from, chunk.to, chunk.bytes, thread);
    awaitPushers();
    if (thread == 0 && chunk.flag != nullptr) storeRelease(chunk.flag, epoch);
  }
}

template <class Element, class Vector>
__device__ void sumPlainly(const PlainPushSum& all, std::uint64_t epoch, int warp) {
  const SumContext& context = all.context;
  const Slices& slices = all.slices;
  const std::int64_t numItems = slices.numTokens * slices.numParts;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kPlainSumWarps;
  for (std::int64_t item = static_cast<std::int64_t>(warp) * gridDim.x + blockIdx.x;
       item < numItems; item += step) {
    const std::int64_t token = item / slices.numParts;
    const std::int64_t part = item - token * slices.numParts;
    const std::int64_t begin = part * slices.partLength;
    const std::int64_t end = begin + slices.partLength;
    if (!awaitToken<false>(context, epoch, token)) return;
    sumVectors<Element, Vector, true, false>(context, context.out, context.start, token, begin,
                                             end < slices.length ? end : slices.length);
    if (context.outWeights != nullptr && part == 0) {
      if (!awaitToken<true>(context, epoch, token)) return;
      sumVectors<Float32Element, Words<4>, true, true>(context, context.outWeights, 0.0F, token, 0,
                                                       context.topk);
    }
  }
}

template <class Element, class Vector, class Copied>
__global__ void __launch_bounds__(kPlainThreads, 1)
    plainPushSumKernel(const __grid_constant__ PlainPushSum all) {
  __shared__ std::int64_t drawn;
  const Order& order = all.context.order;
  const std::uint64_t epoch = currentEpoch(order);
  if (!enterPeers(order)) return;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kPlainPushThreads) {
    // Also by a rank that has no tokens, and perhaps no memory for their weights.
    if (all.context.topk > 0) pushWeights(all.push, epoch);
    pushPlainly<Copied>(all.push, epoch, drawn, thread);
  } else {
    sumPlainly<Element, Vector>(all, epoch, thread / kWarpSize - kPlainPushWarps);
  }
  leavePeers(order);
}

template <class Element, class Vector, class Copied>
void launchPlain(const PushSumArguments& arguments, int blocks, cudaStream_t stream) {
  PlainPushSum all;
  all.context = describeSum(arguments.sum);
  const std::int64_t rowBytes = all.context.rows.rowBytes;
  all.context.landing = {arguments.flags, static_cast<std::int32_t>(arguments.chunkRows)};
  all.slices =
      cutRows(arguments.sum.numTokens, rowBytes / Vector::kBytes, kSumStep, kSumStep, blocks);
  all.push = describePush(arguments, rowBytes, blocks, blocks * kPlainPushWarps);
  EP_LIST_KERNEL(plainPushSumKernel<Element, Vector, Copied>);
  plainPushSumKernel<Element, Vector, Copied>
      <<<static_cast<unsigned>(blocks), kPlainThreads, 0, stream>>>(all);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes and sums rows");
}

template <class Element>
void launchPlainOf(const PushSumArguments& arguments, int blocks, cudaStream_t stream) {
  constexpr int kBytes = Element::kBytes;
  switch (arguments.sum.rowAlignment) {
    case 16:
      return launchPlain<Element, Words<16>, uint4>(arguments, blocks, stream);
    case 8:
      return launchPlain<Element, Words<8>, uint2>(arguments, blocks, stream);
    case 4:
      return launchPlain<Element, Words<4>, unsigned>(arguments, blocks, stream);
    case 2:
      return kBytes == 2 ? launchPlain<Element, Words<2>, unsigned short>(arguments, blocks, stream)
                         : launchPlain<Element, Words<kBytes, false>, unsigned short>(
                               arguments, blocks, stream);
    default:
      return launchPlain<Element, Words<kBytes, false>, unsigned char>(arguments, blocks, stream);
  }
}

bool canPushInBulk(const PushSumArguments& arguments) {
  const std::int64_t rowBytes =
      arguments.sum.hidden * static_cast<std::int64_t>(itemSize(arguments.sum.dtype));
  return arguments.sum.rowAlignment == 16 && rowBytes >= kLeastBulkRowBytes && canCopyInBulk();
}

}  // namespace

void pushAndSumRows(const PushSumArguments& arguments, int numSms, cudaStream_t stream) {
  const PushSumShape shape = pushSumShape(numSms, arguments.sum.numRanks);
  const DataType dtype = arguments.sum.dtype;
  if (canPushInBulk(arguments)) {
    return withElement(
        dtype, [&]<class Element>(Element) { launchBulk<Element>(arguments, shape, stream); });
  }
  withElement(dtype, [&]<class Element>(Element) {
    launchPlainOf<Element>(arguments, shape.blocks, stream);
  });
}

}  // namespace mscclpp_ep::cuda
