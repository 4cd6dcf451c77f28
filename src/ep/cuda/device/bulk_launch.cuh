// SPDX-License-Identifier: MIT
// What the host asks of a GPU before it starts kernels that copy in bulk.
#ifndef MSCCLPP_EP_CUDA_DEVICE_BULK_LAUNCH_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_BULK_LAUNCH_CUH_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

struct DeviceLimits {
  int computeCapability = 0;  ///< 90 for 9.0
  int sharedBytes = 0;        ///< of a block, if it asks for them
  int numSms = 1;
};

inline int deviceAttribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  EP_CUDA_TRY(cudaDeviceGetAttribute(&value, attribute, device), "cannot tell what GPU ", device,
              " can do");
  return value;
}

/// Of the current GPU.
inline const DeviceLimits& deviceLimits() {
  static const std::vector<DeviceLimits> all = [] {
    int count = 0;
    EP_CUDA_TRY(cudaGetDeviceCount(&count), "cannot count the GPUs");
    std::vector<DeviceLimits> limits;
    for (int device = 0; device < count; ++device) {
      const int major = deviceAttribute(cudaDevAttrComputeCapabilityMajor, device);
      const int minor = deviceAttribute(cudaDevAttrComputeCapabilityMinor, device);
      limits.push_back({10 * major + minor,
                        deviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                        deviceAttribute(cudaDevAttrMultiProcessorCount, device)});
    }
    return limits;
  }();
  int device = 0;
  EP_CUDA_TRY(cudaGetDevice(&device), "cannot tell the current GPU");
  return all[static_cast<std::size_t>(device)];
}

/// What a block can have of shared memory on the current GPU, beside so much that it declares.
template <int kDeclaredBytes>
int sharedBytesBeside() {
  return deviceLimits().sharedBytes - kDeclaredBytes;
}

/// Whether the code is compiled for chips with bulk copies: the newest of them that a GPU can run
/// is the one that it runs.
inline constexpr bool kHasBulkCopies = std::max({__CUDA_ARCH_LIST__}) >= 900;

/// Whether the current GPU has bulk copies, and MSCCLPP_EP_PLAIN_COPIES does not forbid them.
inline bool canCopyInBulk() {
  if constexpr (!kHasBulkCopies) return false;
  const char* plain = std::getenv("MSCCLPP_EP_PLAIN_COPIES");
  if (plain != nullptr && std::strcmp(plain, "1") == 0) return false;
  // The kernels are made for the shared memory of data-centre chips; some others have half of it.
  constexpr int kLeastSharedBytes = 200 << 10;
  return deviceLimits().computeCapability >= 90 && deviceLimits().sharedBytes >= kLeastSharedBytes;
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_BULK_LAUNCH_CUH_
