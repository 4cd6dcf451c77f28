// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_EXPORT_HPP_
#define MSCCLPP_EP_EXPORT_HPP_

/// Marks what the shared library exports; everything else is hidden.
#if defined(MSCCLPP_EP_STATIC)
#define MSCCLPP_EP_API
#else
#define MSCCLPP_EP_API __attribute__((visibility("default")))
#endif

/// Hides a class that is nested in an exported one.
#define MSCCLPP_EP_LOCAL __attribute__((visibility("hidden")))

#endif  // MSCCLPP_EP_EXPORT_HPP_
