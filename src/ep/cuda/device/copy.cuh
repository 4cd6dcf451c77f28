// SPDX-License-Identifier: MIT
// Copies of one row to many places.
#ifndef MSCCLPP_EP_CUDA_DEVICE_COPY_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_COPY_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

/// Vectors that a lane loads before it stores the first: enough for a few multiprocessors to have
/// as many bytes on their way as the memory needs to be busy.
inline constexpr int kCopyVectors = 8;
inline constexpr int kCopyStep = kCopyVectors * kWarpSize;

/// Copies the vectors of one step, of which there are `count` from this lane's on, or with `kWhole`
/// as many as there can be.
template <class Vector, bool kWhole>
__device__ __forceinline__ void copyStep(const Vector* in, std::byte* myOut, std::int64_t offset,
                                         unsigned lanes, std::int64_t count) {
  Vector vectors[kCopyVectors];
#pragma unroll
  for (int i = 0; i < kCopyVectors; ++i) {
    if (kWhole || i * kWarpSize < count) vectors[i] = __ldcs(in + offset + i * kWarpSize);
  }
  while (lanes != 0) {
    Vector* out = reinterpret_cast<Vector*>(broadcast(myOut, takeLowest(lanes))) + offset;
#pragma unroll
    for (int i = 0; i < kCopyVectors; ++i) {
      if (kWhole || i * kWarpSize < count) __stcs(out + i * kWarpSize, vectors[i]);
    }
  }
}

/// Copies vectors `begin` to `end` - 1 of `in`, which is read once, to the same place in the rows
/// `myOut` of all `lanes`. Called by a whole warp.
template <class Vector>
__device__ __forceinline__ void copyToMany(const std::byte* in, std::byte* myOut, unsigned lanes,
                                           std::int64_t begin, std::int64_t end) {
  const auto* vectors = reinterpret_cast<const Vector*>(in);
  const int lane = laneIndex();
  std::int64_t at = begin;
  for (; at + kCopyStep <= end; at += kCopyStep) {
    copyStep<Vector, true>(vectors, myOut, at + lane, lanes, kCopyStep);
  }
  if (at < end) copyStep<Vector, false>(vectors, myOut, at + lane, lanes, end - at - lane);
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_COPY_CUH_
