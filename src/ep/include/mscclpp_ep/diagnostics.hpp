// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_DIAGNOSTICS_HPP_
#define MSCCLPP_EP_DIAGNOSTICS_HPP_

#include <cstddef>
#include <map>
#include <string>

#include "mscclpp_ep/export.hpp"

namespace mscclpp_ep {

/// What this build of the library has: "version", "compiler", "simd" (the instruction set in use),
/// "simd_available", and "cuda", "mscclpp" and "ucx", which are "no" where they were left out.
MSCCLPP_EP_API std::map<std::string, std::string> buildInfo();

/// Whether this build has the CUDA backend.
MSCCLPP_EP_API bool isCudaBuilt();
/// GPUs that this process can use: 0 also without a driver, or if CUDA was left out.
MSCCLPP_EP_API int cudaDeviceCount();

/// The copy that rows are moved by, past the caches: for measuring what a machine's memory allows.
MSCCLPP_EP_API void streamCopy(void* out, const void* in, std::size_t bytes);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_DIAGNOSTICS_HPP_
