// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_DISPATCH_HPP_
#define MSCCLPP_EP_CPU_DISPATCH_HPP_

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "core/backend.hpp"
#include "cpu/context.hpp"

namespace mscclpp_ep::cpu {

/// What a rank knows between the two calls of a dispatch.
struct DispatchPlan {
  std::vector<std::int64_t> numRowsFrom;   ///< [R]
  std::vector<std::int64_t> firstRowFrom;  ///< [R]
  std::vector<std::int64_t> perExpert;     ///< [L]
  std::int64_t numRecv = 0;
  std::int64_t numRows = 0;  ///< of the outputs
};

/// Tells the others how many rows they get, and learns how many come.
DispatchPlan exchangeCounts(Context& context, const DispatchRequest& request);

/// Publishes where rows go, sends and receives them.
std::shared_ptr<const HandleState> moveRows(Context& context, const DispatchRequest& request,
                                            const DispatchPlan& plan,
                                            const DispatchOutputs& outputs);

/// Ends a dispatch, whose counts are exchanged, for every rank.
void abandonRows(Context& context, Verdict verdict, std::string_view why);

/// Fills the outputs of Buffer::getDispatchLayout.
void countTokens(Workers& workers, const TensorView& topkIdx, const ExpertPlacement& placement,
                 const LayoutOutputs& outputs);

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_DISPATCH_HPP_
