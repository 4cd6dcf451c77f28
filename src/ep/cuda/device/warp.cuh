// SPDX-License-Identifier: MIT
// What the lanes of a warp do together.
#ifndef MSCCLPP_EP_CUDA_DEVICE_WARP_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_WARP_CUH_

#include <cstddef>
#include <cstdint>

namespace mscclpp_ep::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int laneIndex() { return static_cast<int>(threadIdx.x % kWarpSize); }

/// `value` of lane `lane`.
__device__ __forceinline__ std::byte* broadcast(std::byte* value, int lane) {
  const auto bits = reinterpret_cast<unsigned long long>(value);
  return reinterpret_cast<std::byte*>(__shfl_sync(kAllLanes, bits, lane));
}

__device__ __forceinline__ const std::byte* broadcast(const std::byte* value, int lane) {
  const auto bits = reinterpret_cast<unsigned long long>(value);
  return reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, bits, lane));
}

/// The lowest lane in `lanes`, which is not empty, and which it is taken out of.
__device__ __forceinline__ int takeLowest(unsigned& lanes) {
  const int lane = __ffs(static_cast<int>(lanes)) - 1;
  lanes &= lanes - 1;
  return lane;
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_WARP_CUH_
