// SPDX-License-Identifier: MIT
// Some blocks number the tokens of a chunk each. None waits for another: each counts the tokens
// before its chunk itself, which takes less time than to be told, as that is a byte a token and
// rank. Other blocks count the choices. The host is told when the counts are known, while ordinals
// are still being written.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "cuda/device/bulk_launch.cuh"
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

__device__ __forceinline__ int numThreads() { return static_cast<int>(blockDim.x); }

/// Blocks of either kind.
constexpr std::int64_t kMostChunks = 64;
constexpr std::int64_t kMostCounters = 32;
constexpr std::int64_t kLeastChunkTokens = 256;

/// Groups of a warp's tokens that a block numbers at a time; fewer with many ranks.
constexpr int kMostGroups = 32;
constexpr int kMostMasks = 4096;
/// Experts whose counts a block keeps in shared memory.
constexpr std::int64_t kMostSharedExperts = 4096;

struct PlanContext {
  PlanArguments plan;
  std::int64_t chunkTokens = 0;  ///< a multiple of kWarpSize
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

/// In shared memory: of each rank, and of each group of a step's tokens and rank.
struct Numbering {
  std::int32_t* next;    ///< [R] tokens counted so far
  std::uint32_t* masks;  ///< [groups, R] which tokens go there
  std::int32_t* first;   ///< [groups, R] ordinal of the first of these

  __device__ Numbering(std::int32_t* shared, int numRanks, int numGroups)
      : next(shared),
        masks(reinterpret_cast<std::uint32_t*>(shared + numRanks)),
        first(shared + numRanks + numGroups * numRanks) {}
};

/// Vectors that a thread loads before it looks at the first.
constexpr int kVectorsAhead = 8;
/// Counters of a byte hold what so many rounds count.
constexpr int kMostRounds = 255 / kVectorsAhead;

/// How many of a thread's bytes at 16 places, of each vector that it looked at, were not 0.
struct ByteCounts {
  std::uint32_t words[4] = {};

  __device__ __forceinline__ void add(const uint4& bytes) {
    words[0] += __vsetne4(bytes.x, 0);
    words[1] += __vsetne4(bytes.y, 0);
    words[2] += __vsetne4(bytes.z, 0);
    words[3] += __vsetne4(bytes.w, 0);
  }
  __device__ __forceinline__ bool any() const {
    return (words[0] | words[1] | words[2] | words[3]) != 0;
  }
  __device__ __forceinline__ int at(int place) const {
    return static_cast<int>(words[place / 4] >> (place % 4 * 8) & 0xFF);
  }
  /// That at an even place, and in the upper half the next one.
  __device__ __forceinline__ unsigned pairAt(int place) const {
    return static_cast<unsigned>(at(place) | at(place + 1) << 16);
  }
};

/// Adds to the ranks' counts what stands at their places. Called by whole warps. With a period of 1
/// all threads have the same ranks at the same places, and with any other few do.
__device__ void addCounts(const ByteCounts& counts, int numRanks, int period, std::int32_t* next) {
  constexpr int kPlaces = 16;
  if (!__any_sync(kAllLanes, counts.any())) return;
  if (period == 1) {
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kPlaces; i += 2) {
      // Two sums at a time, in halves of a word.
      const unsigned sums = __reduce_add_sync(kAllLanes, counts.pairAt(i));
      if (laneIndex() / 2 == i / 2)
        mine = static_cast<int>(laneIndex() % 2 == 0 ? sums & 0xFFFF : sums >> 16);
    }
    if (laneIndex() < kPlaces && mine != 0) atomicAdd(next + (laneIndex() & (numRanks - 1)), mine);
    return;
  }
  int rank = static_cast<int>(threadIdx.x) % period * kPlaces % numRanks;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (counts.at(i) != 0) atomicAdd(next + rank, counts.at(i));
    if (++rank == numRanks) rank = 0;
  }
}

/// Counts the tokens before `end` that go to each rank, by vectors. A thread's vectors all begin
/// with the same rank. Called by whole blocks.
__device__ void countByVectors(const PlanArguments& plan, int period, std::int64_t end,
                               std::int32_t* next) {
  const auto* in = reinterpret_cast<const uint4*>(plan.inRank);
  const std::int64_t count = end * plan.numRanks / static_cast<std::int64_t>(sizeof(uint4));
  const int step = numThreads() / period * period;
  std::int64_t at = static_cast<int>(threadIdx.x) < step ? threadIdx.x : count;
  // All threads of a block go round equally often.
  for (std::int64_t base = 0; base < count;) {
    ByteCounts counts;
    for (int round = 0; round < kMostRounds && base < count; ++round) {
      uint4 vectors[kVectorsAhead];
#pragma unroll
      for (int i = 0; i < kVectorsAhead; ++i) {
        const std::int64_t place = at + i * step;
        vectors[i] = place < count ? in[place] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kVectorsAhead; ++i) counts.add(vectors[i]);
      at += kVectorsAhead * step;
      base += kVectorsAhead * step;
    }
    addCounts(counts, plan.numRanks, period, next);
  }
}

/// The same, byte by byte, of which a thread looks at those of one rank at a time.
__device__ void countByBytes(const PlanArguments& plan, std::int64_t end, std::int32_t* next) {
  const int width = min(plan.numRanks, numThreads());
  const int tokens = numThreads() / width;
  const int mine = static_cast<int>(threadIdx.x) / width;
  if (mine >= tokens) return;
  for (int rank = static_cast<int>(threadIdx.x) % width; rank < plan.numRanks; rank += width) {
    int count = 0;
#pragma unroll 8
    for (std::int64_t token = mine; token < end; token += tokens) {
      count += plan.inRank[token * plan.numRanks + rank] != 0 ? 1 : 0;
    }
    if (count != 0) atomicAdd(next + rank, count);
  }
}

/// Some tokens of a chunk, which begin with the first of a group.
struct Step {
  std::int64_t first = 0;
  int count = 0;

  __device__ int numGroups() const { return (count + kWarpSize - 1) / kWarpSize; }
};

/// Finds out which tokens of a step go where.
__device__ void findMasks(const PlanArguments& plan, const Step& step, const Numbering& numbering) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int items = step.numGroups() * plan.numRanks;
  for (int item = warp; item < items; item += numThreads() / kWarpSize) {
    const int group = item / plan.numRanks;
    const int rank = item - group * plan.numRanks;
    const int token = group * kWarpSize + laneIndex();
    const bool goes =
        token < step.count && plan.inRank[(step.first + token) * plan.numRanks + rank] != 0;
    const unsigned mask = __ballot_sync(kAllLanes, goes);
    if (laneIndex() == 0) numbering.masks[item] = mask;
  }
}

/// Finds the ordinals at which the groups begin.
__device__ void numberGroups(const PlanArguments& plan, const Step& step,
                             const Numbering& numbering) {
  for (int rank = static_cast<int>(threadIdx.x); rank < plan.numRanks; rank += numThreads()) {
    std::int32_t next = numbering.next[rank];
    for (int group = 0; group < step.numGroups(); ++group) {
      const int at = group * plan.numRanks + rank;
      numbering.first[at] = next;
      next += __popc(numbering.masks[at]);
    }
    numbering.next[rank] = next;
  }
}

/// Goes over the pairs of a step's tokens and ranks.
class PairCursor {
 public:
  __device__ PairCursor(int numRanks, unsigned pair)
      : numRanks_(numRanks),
        token_(static_cast<int>(pair / static_cast<unsigned>(numRanks))),
        rank_(static_cast<int>(pair) - token_ * numRanks) {}

  __device__ std::int32_t head(const Numbering& numbering) const {
    const int at = token_ / kWarpSize * numRanks_ + rank_;
    const unsigned bit = 1U << (token_ % kWarpSize);
    const unsigned mask = numbering.masks[at];
    return (mask & bit) != 0 ? numbering.first[at] + __popc(mask & (bit - 1)) : -1;
  }
  __device__ void advance() {
    if (++rank_ < numRanks_) return;
    rank_ = 0;
    ++token_;
  }

 private:
  int numRanks_;
  int token_;
  int rank_;
};

/// Pairs whose heads a thread writes at a time.
constexpr int kPairs = 4;

/// Writes what is known of a step's tokens. Heads are in memory of the library's, which is aligned.
__device__ void writeHeads(const PlanArguments& plan, const Step& step,
                           const Numbering& numbering) {
  const std::int64_t first = step.first * plan.numRanks;
  const auto pairs = static_cast<unsigned>(step.count * plan.numRanks);
  const bool aligned = reinterpret_cast<std::uintptr_t>(plan.inRank) % kPairs == 0;
  for (unsigned pair = threadIdx.x * kPairs; pair < pairs; pair += blockDim.x * kPairs) {
    const std::int64_t at = first + pair;
    std::int32_t heads[kPairs];
    PairCursor cursor(plan.numRanks, pair);
    const bool whole = pair + kPairs <= pairs;
#pragma unroll
    for (int i = 0; i < kPairs; ++i, cursor.advance()) {
      heads[i] = pair + i < pairs ? cursor.head(numbering) : -1;
    }
    if (whole && aligned) {
      const int4 vector = make_int4(heads[0], heads[1], heads[2], heads[3]);
      *reinterpret_cast<uchar4*>(plan.shownInRank + at) =
          *reinterpret_cast<const uchar4*>(plan.inRank + at);
      *reinterpret_cast<int4*>(plan.head + at) = vector;
      *reinterpret_cast<int4*>(plan.shownHead + at) = vector;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (pair + i >= pairs) break;
      plan.shownInRank[at + i] = plan.inRank[at + i];
      plan.head[at + i] = heads[i];
      plan.shownHead[at + i] = heads[i];
    }
  }
}

__device__ std::int64_t idAt(const TopkArrays& topk, std::int64_t place) {
  return topk.wide ? static_cast<const std::int64_t*>(topk.ids)[place]
                   : static_cast<const std::int32_t*>(topk.ids)[place];
}

/// For a host that waits: all counts, those given and those found. Threads from both ends, and one
/// in the middle, so that most wait for memory once.
__device__ void writeReport(const PlanArguments& plan, const Scratch& scratch) {
  auto* out = reinterpret_cast<std::int32_t*>(plan.report + 1);
  for (int i = numThreads() - 1 - static_cast<int>(threadIdx.x); i < plan.numRanks;
       i += numThreads()) {
    out[i] = plan.sent[i];
    out[plan.numRanks + i] = plan.perRank[i];
  }
  out += 2 * plan.numRanks;
  for (std::int64_t i = threadIdx.x; i < plan.placement.numExperts; i += numThreads()) {
    out[i] = plan.perExpert[i];
    out[plan.placement.numExperts + i] = scratch.choices[i];
  }
  if (threadIdx.x == blockDim.x / 2) {
    const unsigned long long bad = *scratch.badPlace;
    const auto place = static_cast<std::int64_t>(~bad);
    plan.report->badPlace = bad == 0 ? -1 : place;
    plan.report->badId = bad == 0 ? 0 : idAt(plan.topk, place);
  }
}

/// For a host that looks later: what is wrong.
__device__ void writeNotice(const PlanArguments& plan, const Scratch& scratch) {
  bool differ = false;
  for (std::int64_t i = threadIdx.x; i < plan.numRanks; i += blockDim.x) {
    differ |= plan.sent[i] != plan.perRank[i];
  }
  for (std::int64_t i = threadIdx.x; i < plan.placement.numExperts; i += blockDim.x) {
    differ |= plan.topk.ids != nullptr && plan.perExpert[i] != scratch.choices[i];
  }
  differ = __syncthreads_or(differ) != 0;
  if (threadIdx.x != 0) return;
  // With ids out of range counts differ in any case.
  if (*scratch.badPlace != 0) {
    const std::int64_t place = static_cast<std::int64_t>(~*scratch.badPlace);
    plan.notice->badId = idAt(plan.topk, place);
    plan.notice->badPlace = place;
  } else if (differ) {
    plan.notice->countsDiffer = 1;
  }
}

/// Once all is counted: tells the host, and leaves the scratch as it was.
__device__ void finish(const PlanArguments& plan, const Scratch& scratch) {
  plan.report != nullptr ? writeReport(plan, scratch) : writeNotice(plan, scratch);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (plan.report != nullptr) storeRelease(&plan.report->ticket, plan.ticket);
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
  if (blockIdx.x < context.numCounters) {
    context.plan.topk.wide ? countInBlock<std::int64_t>(context, scratch, sharedWords, blockIdx.x)
                           : countInBlock<std::int32_t>(context, scratch, sharedWords, blockIdx.x);
    finishIfLast(context, scratch);
  } else {
    // The last chunk first: the host waits for it.
    const unsigned turn = blockIdx.x - context.numCounters;
    numberChunk(context, scratch, sharedWords, context.numChunks - 1 - turn);
  }
}

PlanContext describe(const PlanArguments& arguments) {
  PlanContext context;
  context.plan = arguments;
  const std::int64_t tokens = arguments.numTokens;
  context.numThreads = tokens <= kManyTokens ? kFewThreads : kMostThreads;
  const int ranks = arguments.numRanks;
  const auto cut = [](std::int64_t count, std::int64_t parts) {
    return (count + parts - 1) / parts;
  };
  context.chunkTokens =
      std::max(cut(cut(tokens, kMostChunks), kWarpSize) * kWarpSize, kLeastChunkTokens);
  context.numChunks =
      static_cast<unsigned>(std::max<std::int64_t>(cut(tokens, context.chunkTokens), 1));
  context.numGroups = std::clamp(kMostMasks / ranks, 1, kMostGroups);
  constexpr int kVectorBytes = sizeof(uint4);
  const int period = ranks / std::gcd(ranks, kVectorBytes);
  const bool aligned = reinterpret_cast<std::uintptr_t>(arguments.inRank) % kVectorBytes == 0;
  context.period = aligned && period <= context.numThreads ? period : 0;
  const std::int64_t choices = arguments.topk.ids != nullptr ? tokens * arguments.topk.topk : 0;
  context.numCounters = static_cast<unsigned>(
      std::min(cut(choices, context.numThreads * std::int64_t{2}), kMostCounters));
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
  // What a kernel can have without being allowed to, and more than it declares.
  constexpr std::size_t kPlainBytes = 48 << 10;
  constexpr int kOtherSharedBytes = 4096;
  if (bytes > kPlainBytes) {
    allowSharedBytes(planKernel, deviceLimits().sharedBytes - kOtherSharedBytes);
  }
  EP_LIST_KERNEL(planKernel);
  planKernel<<<context.numCounters + context.numChunks, static_cast<unsigned>(context.numThreads),
               bytes, stream>>>(context);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that plans a dispatch");
}

}  // namespace mscclpp_ep::cuda
