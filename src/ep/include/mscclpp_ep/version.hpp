// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_VERSION_HPP_
#define MSCCLPP_EP_VERSION_HPP_

/// The only place in which the version is written: CMake, the wheel and Python read it from here.
#define MSCCLPP_EP_VERSION_MAJOR 0
#define MSCCLPP_EP_VERSION_MINOR 1
#define MSCCLPP_EP_VERSION_PATCH 0

#endif  // MSCCLPP_EP_VERSION_HPP_
