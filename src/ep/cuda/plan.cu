// SPDX-License-Identifier: MIT
// Some blocks number the tokens of a chunk each. None waits for another: each counts the tokens
// before its chunk itself, which takes less time than to be told, as that is a byte a token and
// rank. Other blocks count the choices. The host is told the counts that the caller has given at
// once, and whether they are right when that is known, while ordinals are still being written.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "core/layout.hpp"
#include "cuda/device/bulk_launch.cuh"
#include "cuda/device/numbering.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernel_list.hpp"
#include "cuda/kernels.hpp"
#include "cuda/plan_report.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

/// Threads of a block: more take longer to start, and do more at a time.
constexpr int kFewThreads = 512;
constexpr int kMostThreads = 1024;
constexpr std::int64_t kManyTokens = 16384;

/// Blocks of either kind.
constexpr std::int64_t kMostChunks = 64;
constexpr std::int64_t kMostCounters = 32;
constexpr std::int64_t kLeastChunkTokens = 256;

/// Groups of a warp's tokens that a block numbers at a time; fewer with many ranks.
constexpr int kMostGroups = 32;
constexpr int kMostMasks = 4096;
/// Shared memory that the kernel declares, at most.
constexpr int kDeclaredBytes = 4096;
/// Experts whose counts a block keeps in shared memory.
constexpr std::int64_t kMostSharedExperts = 4096;

struct PlanContext {
  PlanArguments plan;
  std::int64_t chunkTokens = 0;  ///< a multiple of kWarpSize
  unsigned numReporters = 0;     ///< 1 if a host waits
  unsigned numChunks = 1;
  unsigned numCounters = 0;
  int numThreads = kMostThreads;  ///< of a block
  int numGroups = 1;              ///< of a step
  int period = 0;  ///< vectors after which one begins with the same rank; 0: not by vectors
  bool sharedExperts = true;
};

/// Words between kernels of a buffer, which are 0 then.
struct Scratch {
  unsigned* blocksDone;
  unsigned long long* badPlace;  ///< the highest of: all bits but those of a place
  std::int32_t* choices;

  __device__ explicit Scratch(std::int32_t* words)
      : blocksDone(reinterpret_cast<unsigned*>(words)),
        badPlace(reinterpret_cast<unsigned long long*>(words + 2)),
        choices(words + PlanReporter::kScratchHead) {}
};

__device__ std::int64_t idAt(const TopkArrays& topk, std::int64_t place) {
  return topk.wide ? static_cast<const std::int64_t*>(topk.ids)[place]
                   : static_cast<const std::int32_t*>(topk.ids)[place];
}

/// The first id that is out of range.
struct BadId {
  std::int64_t place = -1;  ///< none
  std::int64_t id = 0;

  __device__ BadId(const PlanArguments& plan, const Scratch& scratch) {
    const unsigned long long bad = *scratch.badPlace;
    if (bad == 0) return;
    place = static_cast<std::int64_t>(~bad);
    id = idAt(plan.topk, place);
  }
};

/// For a host that waits.
class Report {
 public:
  __device__ explicit Report(const PlanArguments& plan) : plan_(plan) {}

  __device__ void write(std::int64_t at, std::int32_t value) const {
    storeRelaxed(plan_.report + at, packSignal(static_cast<std::uint32_t>(value), plan_.ticket));
  }
  __device__ void writeLong(std::int64_t at, std::int64_t value) const {
    write(at, static_cast<std::int32_t>(value));
    write(at + 1, static_cast<std::int32_t>(value >> 32));
  }

 private:
  const PlanArguments& plan_;
};

/// Calls `ofRank` and `ofExpert` for each. Threads from both ends, so that most wait for memory
/// once.
template <class OfRank, class OfExpert>
__device__ void forRanksAndExperts(const PlanArguments& plan, OfRank ofRank, OfExpert ofExpert) {
  for (int rank = numThreads() - 1 - static_cast<int>(threadIdx.x); rank < plan.numRanks;
       rank += numThreads()) {
    ofRank(rank);
  }
  for (std::int64_t e = threadIdx.x; e < plan.placement.numExperts; e += numThreads()) ofExpert(e);
}

/// A value of each rank and of each expert.
__device__ void writeCounts(const PlanArguments& plan, std::int64_t rankPlace,
                            const std::int32_t* ofRanks, std::int64_t expertPlace,
                            const std::int32_t* ofExperts) {
  const Report report(plan);
  forRanksAndExperts(
      plan, [&](int rank) { report.write(rankPlace + rank, ofRanks[rank]); },
      [&](std::int64_t e) { report.write(expertPlace + e, ofExperts[e]); });
}

/// Tells the hosts of all ranks what is given of them.
__device__ void tellAll(const PlanArguments& plan) {
  const ReportMap map(plan.numRanks, plan.placement.numExperts);
  const Report report(plan);
  const auto tell = [&](int rank, std::int64_t at, std::int32_t count) {
    storeRelaxed(plan.boards[rank] + at, packCount(count, plan.epoch));
  };
  forRanksAndExperts(
      plan,
      [&](int rank) {
        const std::int32_t count = plan.perRank[rank];
        report.write(map.perRank() + rank, count);
        tell(rank, 0, count);
      },
      [&](std::int64_t e) {
        tell(plan.placement.owner[e], 1 + plan.placement.localIndex[e], plan.perExpert[e]);
      });
}

/// What the host can go on with.
__device__ void reportGiven(const PlanArguments& plan) {
  if (plan.tellsAll) return tellAll(plan);
  const ReportMap map(plan.numRanks, plan.placement.numExperts);
  writeCounts(plan, map.perRank(), plan.perRank, map.perExpert(), plan.perExpert);
}

/// Whether the counts that the caller has given are not those found; to all threads of a block.
__device__ bool countsDiffer(const PlanArguments& plan, const Scratch& scratch) {
  bool differ = false;
  for (std::int64_t i = threadIdx.x; i < plan.numRanks; i += blockDim.x) {
    differ |= plan.sent[i] != plan.perRank[i];
  }
  for (std::int64_t i = threadIdx.x; i < plan.placement.numExperts; i += blockDim.x) {
    differ |= plan.perExpert[i] < 0 ||
              (plan.topk.ids != nullptr && plan.perExpert[i] != scratch.choices[i]);
  }
  return __syncthreads_or(differ) != 0;
}

/// Whether it was right to go on; what was given and found only if not.
__device__ void reportFindings(const PlanArguments& plan, const Scratch& scratch) {
  const ReportMap map(plan.numRanks, plan.placement.numExperts);
  const bool differ = countsDiffer(plan, scratch);
  if (threadIdx.x == 0) {
    const Report report(plan);
    const BadId bad(plan, scratch);
    report.writeLong(map.badPlace(), bad.place + 1);
    report.writeLong(map.badId(), bad.id);
    report.write(map.countsDiffer(), differ ? 1 : 0);
  }
  if (!differ) return;
  writeCounts(plan, map.perRank(), plan.perRank, map.perExpert(), plan.perExpert);
  writeCounts(plan, map.sent(), plan.sent, map.choices(), scratch.choices);
}

/// For a host that looks later: what is wrong.
__device__ void writeNotice(const PlanArguments& plan, const Scratch& scratch) {
  const bool differ = countsDiffer(plan, scratch);
  if (threadIdx.x != 0) return;
  // With ids out of range counts differ in any case.
  const BadId bad(plan, scratch);
  if (bad.place >= 0) {
    plan.notice->badId = bad.id;
    plan.notice->badPlace = bad.place;
  } else if (differ) {
    plan.notice->countsDiffer = 1;
  }
}

/// Once all is counted: tells the host, and leaves the scratch as it was.
__device__ void finish(const PlanArguments& plan, const Scratch& scratch) {
  plan.report != nullptr ? reportFindings(plan, scratch) : writeNotice(plan, scratch);
  __syncthreads();
  if (threadIdx.x == 0) {
    *scratch.badPlace = 0;
    *scratch.blocksDone = 0;
  }
  for (std::int64_t i = threadIdx.x; i < plan.placement.numExperts; i += blockDim.x) {
    scratch.choices[i] = 0;
  }
}

/// Called by each block that counts, when it has: the last one finishes.
__device__ void finishIfLast(const PlanContext& context, const Scratch& scratch) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = addAcquireRelease(scratch.blocksDone, 1) == context.numCounters;
  }
  __syncthreads();
  if (last) finish(context.plan, scratch);
}

/// What the block of one chunk does. That of the last one knows how many tokens there are.
__device__ void numberChunk(const PlanContext& context, const Scratch& scratch,
                            std::int32_t* shared, std::int64_t chunk) {
  const PlanArguments& plan = context.plan;
  const Numbering numbering(shared, plan.numRanks, context.numGroups);
  const std::int64_t begin = chunk * context.chunkTokens;
  const std::int64_t end = min(begin + context.chunkTokens, plan.numTokens);
  const bool isLast = chunk + 1 == context.numChunks;
  for (int rank = static_cast<int>(threadIdx.x); rank < plan.numRanks; rank += numThreads()) {
    numbering.next[rank] = 0;
  }
  __syncthreads();
  if (context.period > 0) {
    countByVectors(plan, context.period, begin, numbering.next);
  } else {
    countByBytes(plan, begin, numbering.next);
  }
  const int most = context.numGroups * kWarpSize;
  Step step{begin, 0};
  do {
    step.first += step.count;
    step.count = static_cast<int>(min(end - step.first, static_cast<std::int64_t>(most)));
    findMasks(plan, step, numbering);
    __syncthreads();
    numberGroups(plan, step, numbering);
    __syncthreads();
    if (isLast && step.first + step.count == end) {
      for (int rank = static_cast<int>(threadIdx.x); rank < plan.numRanks; rank += numThreads()) {
        plan.sent[rank] = numbering.next[rank];
      }
      finishIfLast(context, scratch);
    }
    writeHeads(plan, step, numbering);
    __syncthreads();
  } while (step.first + step.count < end);
}

/// Goes over a block's choices: a thread's are far apart.
class ChoiceCursor {
 public:
  __device__ ChoiceCursor(unsigned first, unsigned step, std::int64_t topk)
      : topk_(topk),
        place_(first),
        step_(step),
        token_(first / static_cast<unsigned>(topk)),
        k_(first - token_ * topk),
        tokenStep_(step / static_cast<unsigned>(topk)),
        kStep_(step - tokenStep_ * topk) {}

  __device__ std::int64_t place() const { return place_; }
  __device__ std::int64_t token() const { return token_; }
  __device__ void advance() {
    place_ += step_;
    token_ += tokenStep_;
    k_ += kStep_;
    if (k_ < topk_) return;
    k_ -= topk_;
    ++token_;
  }

 private:
  std::int64_t topk_;
  std::int64_t place_;
  std::int64_t step_;
  std::int64_t token_;
  std::int64_t k_;
  std::int64_t tokenStep_;
  std::int64_t kStep_;
};

/// Ids that a thread loads before it looks up the first.
constexpr int kIdsAhead = 4;

/// Counts the choices of the tokens that go to the rank of their expert. `owner` and `counts` are
/// of all experts.
template <class Index>
__device__ void countChoices(const PlanContext& context, const Scratch& scratch,
                             const std::int32_t* owner, std::int32_t* counts, unsigned block) {
  const PlanArguments& plan = context.plan;
  const auto* ids = static_cast<const Index*>(plan.topk.ids);
  const std::int64_t count = plan.numTokens * plan.topk.topk;
  ChoiceCursor cursor(block * blockDim.x + threadIdx.x, context.numCounters * blockDim.x,
                      plan.topk.topk);
  while (cursor.place() < count) {
    Index chosen[kIdsAhead];
    std::int64_t places[kIdsAhead];
    const std::uint8_t* marks[kIdsAhead];
#pragma unroll
    for (int i = 0; i < kIdsAhead; ++i, cursor.advance()) {
      places[i] = cursor.place();
      chosen[i] = places[i] < count ? ids[places[i]] : -1;
      marks[i] = plan.inRank + cursor.token() * plan.numRanks;
    }
#pragma unroll
    for (int i = 0; i < kIdsAhead; ++i) {
      if (chosen[i] >= -1 && chosen[i] < plan.placement.numExperts) continue;
      atomicMax(scratch.badPlace, ~static_cast<unsigned long long>(places[i]));
      chosen[i] = -1;
    }
    bool sent[kIdsAhead];
#pragma unroll
    for (int i = 0; i < kIdsAhead; ++i) sent[i] = chosen[i] >= 0 && marks[i][owner[chosen[i]]] != 0;
#pragma unroll
    for (int i = 0; i < kIdsAhead; ++i) {
      if (sent[i]) atomicAdd(counts + chosen[i], 1);
    }
  }
}

template <class Index>
__device__ void countInBlock(const PlanContext& context, const Scratch& scratch,
                             std::int32_t* shared, unsigned block) {
  const PlacementArrays& placement = context.plan.placement;
  if (!context.sharedExperts) {
    return countChoices<Index>(context, scratch, placement.owner, scratch.choices, block);
  }
  std::int32_t* owner = shared + placement.numExperts;
  for (std::int64_t e = threadIdx.x; e < placement.numExperts; e += numThreads()) {
    shared[e] = 0;
    owner[e] = placement.owner[e];
  }
  __syncthreads();
  countChoices<Index>(context, scratch, owner, shared, block);
  __syncthreads();
  for (std::int64_t e = threadIdx.x; e < placement.numExperts; e += numThreads()) {
    if (shared[e] != 0) atomicAdd(scratch.choices + e, shared[e]);
  }
}

__global__ void __launch_bounds__(kMostThreads)
    planKernel(const __grid_constant__ PlanContext context) {
  extern __shared__ std::int32_t sharedWords[];
  const Scratch scratch(context.plan.scratch);
  if (blockIdx.x < context.numReporters) return reportGiven(context.plan);
  const unsigned block = blockIdx.x - context.numReporters;
  if (block < context.numCounters) {
    context.plan.topk.wide ? countInBlock<std::int64_t>(context, scratch, sharedWords, block)
                           : countInBlock<std::int32_t>(context, scratch, sharedWords, block);
    finishIfLast(context, scratch);
  } else {
    // The last chunk first: the host waits for it.
    const unsigned turn = block - context.numCounters;
    numberChunk(context, scratch, sharedWords, context.numChunks - 1 - turn);
  }
}

PlanContext describe(const PlanArguments& arguments) {
  PlanContext context;
  context.plan = arguments;
  context.numReporters = arguments.report != nullptr ? 1 : 0;
  const std::int64_t tokens = arguments.numTokens;
  context.numThreads = tokens <= kManyTokens ? kFewThreads : kMostThreads;
  const int ranks = arguments.numRanks;
  context.chunkTokens =
      std::max(roundUp(divideUp(tokens, kMostChunks), kWarpSize), kLeastChunkTokens);
  context.numChunks =
      static_cast<unsigned>(std::max<std::int64_t>(divideUp(tokens, context.chunkTokens), 1));
  context.numGroups = std::clamp(kMostMasks / ranks, 1, kMostGroups);
  constexpr int kVectorBytes = sizeof(uint4);
  const int period = ranks / std::gcd(ranks, kVectorBytes);
  const bool aligned = reinterpret_cast<std::uintptr_t>(arguments.inRank) % kVectorBytes == 0;
  context.period = aligned && period <= context.numThreads ? period : 0;
  const std::int64_t choices = arguments.topk.ids != nullptr ? tokens * arguments.topk.topk : 0;
  context.numCounters = static_cast<unsigned>(
      std::min(divideUp(choices, context.numThreads * std::int64_t{2}), kMostCounters));
  context.sharedExperts = arguments.placement.numExperts <= kMostSharedExperts;
  return context;
}

std::size_t sharedBytes(const PlanContext& context) {
  const std::int64_t ranks = context.plan.numRanks;
  const std::int64_t numbering = ranks * (1 + 2 * context.numGroups);
  const std::int64_t experts = context.sharedExperts ? 2 * context.plan.placement.numExperts : 0;
  return static_cast<std::size_t>(std::max(numbering, experts)) * sizeof(std::int32_t);
}

}  // namespace

void planDispatch(const PlanArguments& arguments, cudaStream_t stream) {
  const PlanContext context = describe(arguments);
  const std::size_t bytes = sharedBytes(context);
  // With any number of ranks that is within what kernels may have.
  EP_LIST_KERNEL(planKernel, sharedBytesBeside<kDeclaredBytes>);
  planKernel<<<context.numReporters + context.numCounters + context.numChunks,
               static_cast<unsigned>(context.numThreads), bytes, stream>>>(context);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that plans a dispatch");
}

}  // namespace mscclpp_ep::cuda
