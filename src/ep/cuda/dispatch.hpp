// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_DISPATCH_HPP_
#define MSCCLPP_EP_CUDA_DISPATCH_HPP_

#include <memory>

#include "core/backend.hpp"
#include "cuda/context.hpp"
#include "cuda/kernels.hpp"
#include "host/exchange_counts.hpp"

namespace mscclpp_ep::cuda {

/// Publishes where rows go, sends and receives them. `placement` is on the GPU.
std::shared_ptr<const HandleState> moveRows(Context& context, const PlacementArrays& placement,
                                            const DispatchRequest& request,
                                            const DispatchPlan& plan,
                                            const DispatchOutputs& outputs);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DISPATCH_HPP_
