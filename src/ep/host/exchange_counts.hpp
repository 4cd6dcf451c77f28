// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_HOST_EXCHANGE_COUNTS_HPP_
#define MSCCLPP_EP_HOST_EXCHANGE_COUNTS_HPP_

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "core/backend.hpp"
#include "host/context.hpp"

namespace mscclpp_ep {

/// What a rank knows between the two calls of a dispatch; if counts are not on the host, `numRows`
/// only.
struct DispatchPlan {
  std::vector<std::int64_t> numRowsFrom;   ///< [R]
  std::vector<std::int64_t> firstRowFrom;  ///< [R]
  std::vector<std::int64_t> perExpert;     ///< [L]
  std::int64_t numRecv = 0;
  std::int64_t numRows = 0;  ///< of the outputs

  /// [R] rows from each rank that are kept.
  std::vector<std::int64_t> numKeptFrom() const;
};

/// Sets the rows from each rank, of which a plan has the most that can come, and the counts of
/// choices, of which it has none.
using ReceiveCounts = std::function<void(DispatchPlan&)>;

/// Tells the others how many rows they get, and learns how many come: by `receive`, if counts
/// follow.
DispatchPlan exchangeCounts(HostContext& context, const DispatchRequest& request,
                            const ReceiveCounts& receive = {});

/// Ends a dispatch, whose counts are exchanged, for every rank.
void abandonRows(HostContext& context, Verdict verdict, std::string_view why);

/// What a handle says of routing, but for the tensors that it shows; of a cached dispatch, what the
/// handle before said.
std::shared_ptr<HandleState> describeRouting(const HostContext& context,
                                             const DispatchRequest& request,
                                             const DispatchPlan& plan);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_EXCHANGE_COUNTS_HPP_
