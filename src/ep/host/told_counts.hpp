// SPDX-License-Identifier: MIT
// Counts of a dispatch that the ranks' GPUs tell the hosts of all ranks, in their control segments.
#ifndef MSCCLPP_EP_HOST_TOLD_COUNTS_HPP_
#define MSCCLPP_EP_HOST_TOLD_COUNTS_HPP_

#include <cstdint>

#include "core/layout.hpp"
#include "host/context.hpp"
#include "host/exchange_counts.hpp"

namespace mscclpp_ep {

/// Whether there is room in a control segment for the counts of each rank's experts, and of rows.
bool fitToldCounts(const ExpertPlacement& placement, int numRanks);

/// Takes the counts of the current operation that come to this rank, of which it knows its own, and
/// waits for those that are late as Transport::wait() does.
void receiveToldCounts(const HostContext& context, std::int64_t numLocalExperts,
                       DispatchPlan& plan);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_TOLD_COUNTS_HPP_
