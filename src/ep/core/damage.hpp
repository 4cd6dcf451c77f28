// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CORE_DAMAGE_HPP_
#define MSCCLPP_EP_CORE_DAMAGE_HPP_

#include <string>

#include "core/packets.hpp"

namespace mscclpp_ep {

/// What is said of a row that arrived with another seal than is right for it: whose it is, and what
/// differs.
std::string describeDamage(const RowSeal& expected, const RowSeal& sent);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_DAMAGE_HPP_
