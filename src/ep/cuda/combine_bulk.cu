// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/combine_bulk.hpp"
#include "cuda/device/bulk_launch.cuh"
#include "cuda/device/bulk_sum.cuh"
#include "cuda/device/sum_weights.cuh"
#include "cuda/device/visit.cuh"
#include "cuda/kernel_list.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constexpr int kMostThreads = (kPipes * kPipeWarps + kWeightWarps) * kWarpSize;
/// For barriers and the like.
constexpr int kOtherSharedBytes = 3072;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// What each warp of a block does, as of bulk_sum.cuh. Those that read memory of peers are the
/// parts of the visit.
template <class Element>
__device__ void runRole(const BulkSum& sum, std::uint64_t epoch, SumRing* rings,
                        std::byte* stages) {
  const SumContext& context = sum.context;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int weightWarp = warp - kPipes * kPipeWarps;
  if (weightWarp < 0) {
    runPipe<Element, false>(sum, blockIdx.x, gridDim.x, epoch, rings, stages, warp);
    if (warp % kPipeWarps != 0) return;
  } else if (awaitPeers(context.order, epoch)) {
    const std::int64_t numTokens = sum.parts.numItems / sum.parts.perRow;
    sumWeights<false>(context, ItemRange::of(numTokens, blockIdx.x, gridDim.x), epoch,
                      weightWarp * kWarpSize + laneIndex(), kWeightWarps * kWarpSize);
  }
  const unsigned perBlock = kPipes + (context.outWeights != nullptr ? kWeightWarps : 0);
  finishPart(context.order, epoch, gridDim.x * perBlock);
}

#endif

template <class Element>
__global__ void __launch_bounds__(kMostThreads, 1)
    bulkSumKernel(const __grid_constant__ BulkSum sum, int numStages) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte stages[];
  __shared__ SumRing rings[kPipes];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (warp < kPipes) {
    rings[warp].init(numStages);
    fenceBarrierInit();
  }
  const std::uint64_t epoch = beginVisit(sum.context.order);
  if (epoch == 0) return;
  runRole<Element>(sum, epoch, rings, stages);
  endVisit(sum.context.order);
#endif
}

template <class Element>
void launch(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  BulkSum sum;
  sum.context = describeSum(arguments);
  const std::int64_t sms = std::max(numSms, 1);
  sum.parts = cutIntoParts(arguments.numTokens, sum.context.rows.rowBytes, sms);
  const std::int64_t room = sharedBytesBeside<kOtherSharedBytes>();
  const auto numStages =
      static_cast<int>(std::min<std::int64_t>(room / sum.parts.partBytes / kPipes, kMostStages));
  const int bytes = kPipes * numStages * static_cast<int>(sum.parts.partBytes);
  const auto blocks = static_cast<unsigned>(std::clamp<std::int64_t>(sum.parts.numItems, 1, sms));
  const int warps = kPipes * kPipeWarps + (arguments.outWeights != nullptr ? kWeightWarps : 0);
  EP_LIST_KERNEL(bulkSumKernel<Element>, sharedBytesBeside<kOtherSharedBytes>);
  bulkSumKernel<Element><<<blocks, warps * kWarpSize, bytes, stream>>>(sum, numStages);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that sums rows");
}

}  // namespace

bool canSumInBulk(const SumArguments& arguments) {
  const std::int64_t rowBytes =
      arguments.hidden * static_cast<std::int64_t>(itemSize(arguments.dtype));
  return arguments.rowAlignment == 16 && rowBytes >= kLeastBulkRowBytes && canCopyInBulk();
}

void sumRowsInBulk(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  withElement(arguments.dtype,
              [&]<class Element>(Element) { launch<Element>(arguments, numSms, stream); });
}

}  // namespace mscclpp_ep::cuda
