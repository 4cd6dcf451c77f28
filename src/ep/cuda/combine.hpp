// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_COMBINE_HPP_
#define MSCCLPP_EP_CUDA_COMBINE_HPP_

#include "core/backend.hpp"
#include "cuda/context.hpp"

namespace mscclpp_ep::cuda {

/// Sums the rows of each token of this rank, where their owners have left them.
void combineRows(Context& context, const CombineRequest& request);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_COMBINE_HPP_
