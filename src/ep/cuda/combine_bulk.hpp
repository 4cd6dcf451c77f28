// SPDX-License-Identifier: MIT
// sumRows() for GPUs with bulk copies, where rows suit them.
#ifndef MSCCLPP_EP_CUDA_COMBINE_BULK_HPP_
#define MSCCLPP_EP_CUDA_COMBINE_BULK_HPP_

#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

/// Whether the current GPU can sum such rows by bulk copies, and is faster so.
bool canSumInBulk(const SumArguments& arguments);

void sumRowsInBulk(const SumArguments& arguments, int numSms, cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_COMBINE_BULK_HPP_
