// SPDX-License-Identifier: MIT
// How the rows of tokens are shared out among warps.
#ifndef MSCCLPP_EP_CUDA_DEVICE_SLICES_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_SLICES_CUH_

#include <algorithm>
#include <cstdint>

#include "core/layout.hpp"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

/// Not 32, with which a thread would have too few registers for what it has on its way.
inline constexpr int kBlockWarps = 24;
inline constexpr int kBlockThreads = kBlockWarps * kWarpSize;

/// Slices for each warp where rows are long enough: with fewer, many warps would be idle while the
/// last slices are done.
inline constexpr std::int64_t kSlicesPerWarp = 4;

/// Every token's row of `length` vectors, cut into `numParts` parts of at most `partLength`. A
/// slice is one part of one row.
struct Slices {
  std::int64_t numTokens = 0;
  std::int64_t length = 0;
  std::int64_t numParts = 1;
  std::int64_t partLength = 0;
};

struct LaunchShape {
  unsigned blocks = 0;
  unsigned threads = 0;
};

/// `step`: the vectors that a warp does at a time, into fewer of which no row is cut. `granule`:
/// what the parts, but the last, are multiples of.
inline Slices cutRows(std::int64_t numTokens, std::int64_t length, std::int64_t step,
                      std::int64_t granule, int numSms) {
  const std::int64_t wanted = std::max(numSms, 1) * (kBlockWarps * kSlicesPerWarp);
  const std::int64_t steps = std::max<std::int64_t>(divideUp(length, step), 1);
  const std::int64_t rows = std::max<std::int64_t>(numTokens, 1);
  const std::int64_t most = std::min(divideUp(wanted, rows), steps);
  const std::int64_t perPart = std::max<std::int64_t>(divideUp(length, most), 1);
  const std::int64_t partLength = roundUp(perPart, granule);
  const std::int64_t numParts = std::max<std::int64_t>(divideUp(length, partLength), 1);
  return {numTokens, length, numParts, partLength};
}

/// One block for each multiprocessor, as long as there are slices, and only then more warps in it.
/// One block in any case.
inline LaunchShape shapeFor(const Slices& slices, int numSms) {
  const std::int64_t sms = std::max(numSms, 1);
  const std::int64_t count = slices.numTokens * slices.numParts;
  const std::int64_t warps = std::clamp<std::int64_t>(divideUp(count, sms), 1, kBlockWarps);
  const std::int64_t blocks = std::clamp<std::int64_t>(divideUp(count, warps), 1, sms);
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarpSize)};
}

/// Goes over the slices of a warp. First parts come first, so that each warp gets about as many of
/// each part, though they differ in length.
class SliceCursor {
 public:
  __device__ explicit SliceCursor(const Slices& slices)
      : slices_(slices),
        token_(static_cast<std::int64_t>(threadIdx.x / kWarpSize) * gridDim.x + blockIdx.x) {
    wrap();
  }

  __device__ bool valid() const { return part_ < slices_.numParts; }
  __device__ std::int64_t token() const { return token_; }
  __device__ bool isFirstPart() const { return part_ == 0; }
  __device__ std::int64_t begin() const { return part_ * slices_.partLength; }
  __device__ std::int64_t end() const {
    const std::int64_t end = begin() + slices_.partLength;
    return end < slices_.length ? end : slices_.length;
  }

  __device__ void advance() {
    token_ += static_cast<std::int64_t>(blockDim.x / kWarpSize) * gridDim.x;
    wrap();
  }

 private:
  /// Without a division, which takes about as long as copying a slice.
  __device__ void wrap() {
    while (token_ >= slices_.numTokens && valid()) {
      token_ -= slices_.numTokens;
      ++part_;
    }
  }

  const Slices& slices_;
  std::int64_t token_;
  std::int64_t part_ = 0;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_SLICES_CUH_
