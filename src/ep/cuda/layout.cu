// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device/warp.cuh"
#include "cuda/kernel_list.hpp"
#include "cuda/kernels.hpp"
#include "cuda/plan_report.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
/// Each adds its counts to those of all, which costs more than the counting where there are many.
constexpr std::int64_t kMaxBlocks = 128;
/// What a block may have without asking.
constexpr std::int64_t kSharedBytes = 48 << 10;

/// Where a block counts: in its shared memory, or where that is too small, straight in the outputs.
struct Counters {
  std::int32_t* perRank;
  std::int32_t* perExpert;
};

/// One of them, if there are several.
__device__ void noticeBadId(const CountArguments& arguments, std::int64_t place, std::int64_t id) {
  arguments.notice->badId = id;
  arguments.notice->badPlace = place;
}

/// Marks the ranks of a token, and counts its choices.
template <class Index>
__device__ void countChoices(const CountArguments& arguments, const Counters& counters,
                             std::int64_t token) {
  const std::int64_t topk = arguments.topk.topk;
  const Index* ids = static_cast<const Index*>(arguments.topk.ids) + token * topk;
  std::uint8_t* inRank = arguments.inRank + token * arguments.numRanks;
  for (std::int64_t k = laneIndex(); k < topk; k += kWarpSize) {
    const Index id = ids[k];
    if (id < 0 || id >= arguments.numExperts) {
      if (id < -1 || id >= arguments.numExperts) noticeBadId(arguments, token * topk + k, id);
      continue;
    }
    atomicAdd(counters.perExpert + id, 1);
    inRank[arguments.owner[id]] = 1;
  }
}

/// Counts the ranks that are marked.
__device__ void countRanks(const CountArguments& arguments, const Counters& counters,
                           std::int64_t token) {
  const std::uint8_t* inRank = arguments.inRank + token * arguments.numRanks;
  for (std::int64_t rank = laneIndex(); rank < arguments.numRanks; rank += kWarpSize) {
    if (inRank[rank] != 0) atomicAdd(counters.perRank + rank, 1);
  }
}

template <class Index>
__device__ void countAll(const CountArguments& arguments, const Counters& counters) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps;
  std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  for (; token < arguments.numTokens; token += step) {
    countChoices<Index>(arguments, counters, token);
    __syncwarp();  // lanes see each other's marks
    countRanks(arguments, counters, token);
  }
}

__device__ void addCounts(std::int32_t* out, const std::int32_t* counts, std::int64_t n) {
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    if (counts[i] != 0) atomicAdd(out + i, counts[i]);
  }
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    countKernel(const __grid_constant__ CountArguments arguments) {
  countAll<Index>(arguments, {arguments.perRank, arguments.perExpert});
}

template <class Index>
__global__ void __launch_bounds__(kThreads)
    countSharedKernel(const __grid_constant__ CountArguments arguments) {
  extern __shared__ std::int32_t counts[];
  const std::int64_t numCounts = arguments.numRanks + arguments.numExperts;
  for (std::int64_t i = threadIdx.x; i < numCounts; i += kThreads) counts[i] = 0;
  __syncthreads();
  countAll<Index>(arguments, {counts, counts + arguments.numRanks});
  __syncthreads();
  addCounts(arguments.perRank, counts, arguments.numRanks);
  addCounts(arguments.perExpert, counts + arguments.numRanks, arguments.numExperts);
}

template <class Index>
void launchCount(const CountArguments& arguments, cudaStream_t stream) {
  const std::int64_t needed = (arguments.numTokens + kWarps - 1) / kWarps;
  const auto blocks = static_cast<unsigned>(std::min(needed, kMaxBlocks));
  const std::int64_t bytes =
      (arguments.numRanks + arguments.numExperts) * static_cast<std::int64_t>(sizeof(std::int32_t));
  if (bytes <= kSharedBytes) {
    const auto shared = static_cast<std::size_t>(bytes);
    EP_LIST_KERNEL(countSharedKernel<Index>);
    countSharedKernel<Index><<<blocks, kThreads, shared, stream>>>(arguments);
  } else {
    EP_LIST_KERNEL(countKernel<Index>);
    countKernel<Index><<<blocks, kThreads, 0, stream>>>(arguments);
  }
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that counts tokens");
}

void clear(void* array, std::int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  EP_CUDA_TRY(cudaMemsetAsync(array, 0, static_cast<std::size_t>(bytes), stream),
              "cannot clear the counts of tokens");
}

}  // namespace

void countTokens(const CountArguments& arguments, cudaStream_t stream) {
  constexpr auto kCountBytes = static_cast<std::int64_t>(sizeof(std::int32_t));
  clear(arguments.perRank, arguments.numRanks * kCountBytes, stream);
  clear(arguments.perExpert, arguments.numExperts * kCountBytes, stream);
  clear(arguments.inRank, arguments.numTokens * arguments.numRanks, stream);
  if (arguments.numTokens == 0) return;
  arguments.topk.wide ? launchCount<std::int64_t>(arguments, stream)
                      : launchCount<std::int32_t>(arguments, stream);
}

}  // namespace mscclpp_ep::cuda
