// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_DIAGNOSTICS_HPP_
#define MSCCLPP_EP_DIAGNOSTICS_HPP_

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "mscclpp_ep/export.hpp"

namespace mscclpp_ep {

/// What this build of the library has: "version", "compiler", "simd" (the instruction set in use),
/// "simd_available", and "cuda", "mscclpp" and "ucx", which are "no" where they were left out.
MSCCLPP_EP_API std::map<std::string, std::string> buildInfo();

/// Whether this build has the CUDA backend.
MSCCLPP_EP_API bool isCudaBuilt();
/// GPUs that this process can use: 0 also without a driver, or if CUDA was left out.
MSCCLPP_EP_API int cudaDeviceCount();

/// A GPU of this process.
struct GpuInfo {
  std::string name;
  std::size_t totalBytes = 0;
  std::size_t freeBytes = 0;
  int multiprocessors = 0;
  int capabilityMajor = 0;
  int capabilityMinor = 0;
  bool posixHandles = false;  ///< shares memory by file descriptors, which processes need
  std::vector<bool> reaches;  ///< [GPUs] whose memory it can use
};
/// Empty without CUDA or a driver. Throws CudaError if one does not answer.
MSCCLPP_EP_API std::vector<GpuInfo> gpus();

/// As CUDA numbers them, 13000 for 13.0; 0: there is none.
struct CudaVersions {
  int runtime = 0;
  int driver = 0;  ///< the newest that the driver knows
};
MSCCLPP_EP_API CudaVersions cudaVersions();

/// The copy that rows are moved by, past the caches: for measuring what a machine's memory allows.
MSCCLPP_EP_API void streamCopy(void* out, const void* in, std::size_t bytes);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_DIAGNOSTICS_HPP_
