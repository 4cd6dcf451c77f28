// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>

#include "cuda/combine_bulk.hpp"
#include "cuda/device/order.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/slices.cuh"
#include "cuda/device/summands.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernel_list.hpp"
#include "cuda/kernels.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

struct PlainSum {
  SumContext context;
  Slices slices;
};

template <class Element, class Vector>
__global__ void __launch_bounds__(kBlockThreads, 1)
    sumKernel(const __grid_constant__ PlainSum sum) {
  const SumContext& context = sum.context;
  if (!enterPeers(context.order)) return;
  for (SliceCursor slice(sum.slices); slice.valid(); slice.advance()) {
    const std::int64_t token = slice.token();
    sumVectors<Element, Vector, false, false>(context, context.out, context.start, token,
                                              slice.begin(), slice.end());
    if (context.outWeights != nullptr && slice.isFirstPart()) {
      sumVectors<Float32Element, Words<4>, false, true>(context, context.outWeights, 0.0F, token, 0,
                                                        context.topk);
    }
  }
  leavePeers(context.order);
}

template <class Element, class Vector>
void launchSum(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  PlainSum sum;
  sum.context = describeSum(arguments);
  const std::int64_t length = sum.context.rows.rowBytes / Vector::kBytes;
  sum.slices = cutRows(arguments.numTokens, length, kSumStep, kSumStep, numSms);
  const LaunchShape shape = shapeFor(sum.slices, numSms);
  EP_LIST_KERNEL(sumKernel<Element, Vector>);
  sumKernel<Element, Vector><<<shape.blocks, shape.threads, 0, stream>>>(sum);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that sums rows");
}

template <class Element>
void sumRowsOf(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  constexpr int kBytes = Element::kBytes;
  switch (arguments.rowAlignment) {
    case 16:
      return launchSum<Element, Words<16>>(arguments, numSms, stream);
    case 8:
      return launchSum<Element, Words<8>>(arguments, numSms, stream);
    case 4:
      return launchSum<Element, Words<4>>(arguments, numSms, stream);
    default:
      return arguments.rowAlignment == kBytes
                 ? launchSum<Element, Words<kBytes>>(arguments, numSms, stream)
                 : launchSum<Element, Words<kBytes, false>>(arguments, numSms, stream);
  }
}

}  // namespace

void sumRows(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  if (canSumInBulk(arguments)) return sumRowsInBulk(arguments, numSms, stream);
  withElement(arguments.dtype,
              [&]<class Element>(Element) { sumRowsOf<Element>(arguments, numSms, stream); });
}

}  // namespace mscclpp_ep::cuda
