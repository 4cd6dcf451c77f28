// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TRANSPORT_BOOTSTRAP_COMMON_HPP_
#define MSCCLPP_EP_TRANSPORT_BOOTSTRAP_COMMON_HPP_

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "core/check.hpp"

namespace mscclpp_ep {

using Seconds = std::chrono::duration<double>;
using Clock = std::chrono::steady_clock;

/// What both bootstraps ask of their arguments.
inline void checkGroup(int size, Seconds timeout) {
  EP_EXPECTS(size >= 1, "a group has ", size, " ranks; it must have at least 1");
  EP_EXPECTS(timeout.count() > 0, "a timeout is ", timeout.count(), " s; it must be positive");
}

/// When a wait that begins now is over. A clock cannot count as far as "infinity".
inline Clock::time_point deadlineAfter(Seconds timeout) {
  constexpr Seconds kTenYears = std::chrono::hours(24 * 3650);
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::min(timeout, kTenYears));
}

/// What a wait of `timeout` for `missing` ends in.
inline std::string missingText(Seconds timeout, const std::vector<int>& missing) {
  return cat("waited ", timeout.count(), " s for ranks that have not come: ", missing,
             ". Check that they were started, with the same group, and still run");
}

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_BOOTSTRAP_COMMON_HPP_
