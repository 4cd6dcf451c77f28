// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernel_list.hpp"
#include "cuda/kernels.hpp"
#include "cuda/plan_report.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
/// Tokens that a thread does at a time, one after another.
constexpr int kTokens = 4;
constexpr std::int64_t kStep = kThreads * kTokens;
/// Blocks that count choices, beside those that number tokens.
constexpr unsigned kMostCounters = 16;

/// The sums of the values of the threads before each; and of all, in `total`.
__device__ int exclusiveSum(int value, int& total) {
  __shared__ int sums[kWarps];
  const int lane = laneIndex();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int inclusive = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();  // the sums of a call before have been read
  if (lane == kWarpSize - 1) sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  return before + inclusive - value;
}

/// Numbers the tokens that go to one rank.
__device__ void numberTokens(const PlanArguments& plan, int rank) {
  std::int32_t next = 0;
  for (std::int64_t base = 0; base < plan.numTokens; base += kStep) {
    const std::int64_t first = base + static_cast<std::int64_t>(threadIdx.x) * kTokens;
    std::uint8_t marks[kTokens] = {};
    int count = 0;
    for (int i = 0; i < kTokens; ++i) {
      if (first + i < plan.numTokens) marks[i] = plan.inRank[(first + i) * plan.numRanks + rank];
      count += marks[i] != 0 ? 1 : 0;
    }
    int total = 0;
    std::int32_t ordinal = next + exclusiveSum(count, total);
    for (int i = 0; i < kTokens && first + i < plan.numTokens; ++i) {
      const std::int64_t at = (first + i) * plan.numRanks + rank;
      const std::int32_t head = marks[i] != 0 ? ordinal++ : -1;
      plan.head[at] = head;
      plan.shownHead[at] = head;
      plan.shownInRank[at] = marks[i];
    }
    next += total;
  }
  if (threadIdx.x == 0) plan.sent[rank] = next;
}

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

/// Counts the choices of the tokens that go to the rank of their expert.
template <class Index>
__device__ void countChoices(const PlanArguments& plan, const Scratch& scratch, unsigned block,
                             unsigned blocks) {
  const auto* ids = static_cast<const Index*>(plan.topk.ids);
  const std::int64_t count = plan.numTokens * plan.topk.topk;
  for (std::int64_t i = block * kThreads + threadIdx.x; i < count; i += blocks * kThreads) {
    const Index id = ids[i];
    if (id < -1 || id >= plan.placement.numExperts) {
      atomicMax(scratch.badPlace, ~static_cast<unsigned long long>(i));
      continue;
    }
    if (id < 0) continue;
    const std::int64_t token = i / plan.topk.topk;
    const bool sent = plan.inRank[token * plan.numRanks + plan.placement.owner[id]] != 0;
    if (sent) atomicAdd(scratch.choices + id, 1);
  }
}

__device__ std::int64_t idAt(const TopkArrays& topk, std::int64_t place) {
  return topk.wide ? static_cast<const std::int64_t*>(topk.ids)[place]
                   : static_cast<const std::int32_t*>(topk.ids)[place];
}

/// For a host that waits: all counts, those given and those found.
__device__ void writeReport(const PlanArguments& plan, const Scratch& scratch) {
  auto* out = reinterpret_cast<std::int32_t*>(plan.report + 1);
  for (std::int64_t i = threadIdx.x; i < plan.numRanks; i += blockDim.x) {
    out[i] = plan.sent[i];
    out[plan.numRanks + i] = plan.perRank[i];
  }
  out += 2 * plan.numRanks;
  for (std::int64_t i = threadIdx.x; i < plan.placement.numExperts; i += blockDim.x) {
    out[i] = plan.perExpert[i];
    out[plan.placement.numExperts + i] = scratch.choices[i];
  }
  if (threadIdx.x == 0) {
    const std::int64_t place = static_cast<std::int64_t>(~*scratch.badPlace);
    plan.report->badPlace = *scratch.badPlace == 0 ? -1 : place;
    plan.report->badId = *scratch.badPlace == 0 ? 0 : idAt(plan.topk, place);
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

/// What the last block does: tells the host, and leaves the scratch as it was.
__device__ void finish(const PlanArguments& plan, const Scratch& scratch) {
  plan.report != nullptr ? writeReport(plan, scratch) : writeNotice(plan, scratch);
  __syncthreads();
  for (std::int64_t i = threadIdx.x; i < plan.placement.numExperts; i += blockDim.x) {
    scratch.choices[i] = 0;
  }
  if (threadIdx.x != 0) return;
  *scratch.badPlace = 0;
  *scratch.blocksDone = 0;
  __threadfence_system();
  if (plan.report != nullptr) storeRelease(&plan.report->ticket, plan.ticket);
}

__global__ void __launch_bounds__(kThreads)
    planKernel(const __grid_constant__ PlanArguments plan, unsigned counters) {
  const Scratch scratch(plan.scratch);
  const unsigned numberers = gridDim.x - counters;
  if (blockIdx.x < numberers) {
    for (int rank = blockIdx.x; rank < plan.numRanks; rank += numberers) numberTokens(plan, rank);
  } else {
    const unsigned block = blockIdx.x - numberers;
    plan.topk.wide ? countChoices<std::int64_t>(plan, scratch, block, counters)
                   : countChoices<std::int32_t>(plan, scratch, block, counters);
  }
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(scratch.blocksDone, 1) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (last) finish(plan, scratch);
}

}  // namespace

void planDispatch(const PlanArguments& arguments, cudaStream_t stream) {
  constexpr int kMostNumberers = 64;
  const auto numberers = static_cast<unsigned>(
      arguments.numRanks < kMostNumberers ? arguments.numRanks : kMostNumberers);
  const std::int64_t choices =
      arguments.topk.ids != nullptr ? arguments.numTokens * arguments.topk.topk : 0;
  const std::int64_t wanted = (choices + kThreads - 1) / kThreads;
  const auto counters = static_cast<unsigned>(wanted < kMostCounters ? wanted : kMostCounters);
  EP_LIST_KERNEL(planKernel);
  planKernel<<<numberers + counters, kThreads, 0, stream>>>(arguments, counters);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that plans a dispatch");
}

}  // namespace mscclpp_ep::cuda
