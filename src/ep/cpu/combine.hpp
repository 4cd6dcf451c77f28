// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_COMBINE_HPP_
#define MSCCLPP_EP_CPU_COMBINE_HPP_

#include "core/backend.hpp"
#include "cpu/context.hpp"

namespace mscclpp_ep::cpu {

/// Sums the rows of this rank's tokens from every rank's memory, and lets the others read its own.
void combineRows(Context& context, const CombineRequest& request);

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_COMBINE_HPP_
