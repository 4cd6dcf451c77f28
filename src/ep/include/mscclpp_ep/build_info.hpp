// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_BUILD_INFO_HPP_
#define MSCCLPP_EP_BUILD_INFO_HPP_

#include <map>
#include <string>

#include "mscclpp_ep/export.hpp"

namespace mscclpp_ep {

/// What this build of the library has: "version", "compiler", "simd" (the instruction set in use),
/// "simd_available", and "cuda", "mscclpp" and "ucx", which are "no" where they were left out.
MSCCLPP_EP_API std::map<std::string, std::string> buildInfo();

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_BUILD_INFO_HPP_
