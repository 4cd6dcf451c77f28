// SPDX-License-Identifier: MIT
// How ranks tell each other, and wait to be told, how far they are with rows.
#ifndef MSCCLPP_EP_CPU_PROGRESS_HPP_
#define MSCCLPP_EP_CPU_PROGRESS_HPP_

#include <cstdint>
#include <span>

#include "host/context.hpp"

namespace mscclpp_ep::cpu {

/// The peers that have not raised as many rows as `needed`, [R], says.
Awaited missingRows(const HostContext& context, Progress which,
                    std::span<const std::int64_t> needed, const char* what);

/// Tells the peers that this rank has read the rows of a combine, and returns when they have read
/// this rank's.
void finishReading(const HostContext& context);

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_PROGRESS_HPP_
