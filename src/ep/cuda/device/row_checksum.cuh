// SPDX-License-Identifier: MIT
// The checksum of a row and of what goes with it, made by a warp. It tells damage, not an attack.
#ifndef MSCCLPP_EP_CUDA_DEVICE_ROW_CHECKSUM_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_ROW_CHECKSUM_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

/// A sum over words, each mixed with its place, so that lanes may take words in any order, and
/// however the row is aligned.
class RowChecksum {
 public:
  /// Parts of a row, whose words have places of their own.
  enum class Part : std::uint64_t { row, scales, ids, weights };

  __device__ void add(Part part, std::int64_t place, std::uint64_t word) {
    const std::uint64_t where =
        static_cast<std::uint64_t>(part) << 60 ^ static_cast<std::uint64_t>(place);
    // Both halves of a product, folded: every bit of either factor reaches all of the result.
    const std::uint64_t a = word ^ 0x243F6A8885A308D3U;
    const std::uint64_t b = where * 0x9E3779B97F4A7C15U ^ 0x13198A2E03707345U;
    sum_ += (a * b) ^ __umul64hi(a, b) ^ word;
  }

  /// Bytes, eight to a word. Each lane takes its part of them.
  __device__ void addBytes(Part part, const std::byte* data, std::int64_t bytes) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(data) % sizeof(std::uint64_t) == 0;
    for (std::int64_t at = laneIndex() * 8; at < bytes; at += kWarpSize * 8) {
      const std::int64_t left = bytes - at;
      add(part, at,
          aligned && left >= 8 ? *reinterpret_cast<const std::uint64_t*>(data + at)
                               : assemble(data + at, left < 8 ? left : 8));
    }
  }

  /// In all lanes.
  __device__ std::uint64_t total() const {
    std::uint64_t sum = sum_;
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(sum), distance);
    }
    return sum;
  }

 private:
  __device__ static std::uint64_t assemble(const std::byte* data, std::int64_t bytes) {
    std::uint64_t word = 0;
    for (std::int64_t i = 0; i < bytes; ++i) {
      word |= static_cast<std::uint64_t>(static_cast<unsigned char>(data[i])) << (8 * i);
    }
    return word;
  }

  std::uint64_t sum_ = 0;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_ROW_CHECKSUM_CUH_
