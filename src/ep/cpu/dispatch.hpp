// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_DISPATCH_HPP_
#define MSCCLPP_EP_CPU_DISPATCH_HPP_

#include <memory>

#include "core/backend.hpp"
#include "cpu/context.hpp"
#include "host/exchange_counts.hpp"

namespace mscclpp_ep::cpu {

/// Publishes where rows go, sends and receives them.
std::shared_ptr<const HandleState> moveRows(Context& context, const DispatchRequest& request,
                                            const DispatchPlan& plan,
                                            const DispatchOutputs& outputs);

/// Fills the outputs of Buffer::getDispatchLayout.
void countTokens(Workers& workers, const TensorView& topkIdx, const ExpertPlacement& placement,
                 const LayoutOutputs& outputs);

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_DISPATCH_HPP_
