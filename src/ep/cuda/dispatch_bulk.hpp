// SPDX-License-Identifier: MIT
// pushRows() by bulk copies, where the GPU has them.
#ifndef MSCCLPP_EP_CUDA_DISPATCH_BULK_HPP_
#define MSCCLPP_EP_CUDA_DISPATCH_BULK_HPP_

#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

/// Whether the current GPU can, and it pays. MSCCLPP_EP_PLAIN_COPIES=1 in the environment forbids.
bool canPushInBulk(const PushArguments& arguments);

/// As pushRows().
void pushRowsInBulk(const PushArguments& arguments, int numSms, cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DISPATCH_BULK_HPP_
