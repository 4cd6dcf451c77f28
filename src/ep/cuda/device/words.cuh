// SPDX-License-Identifier: MIT
// Vectors of elements as words in registers, whatever their alignment in memory.
#ifndef MSCCLPP_EP_CUDA_DEVICE_WORDS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_WORDS_CUH_

#include <cstddef>
#include <cstdint>

namespace mscclpp_ep::cuda {

/// `kBytes` bytes (16, 8, 4 or 2) that are so aligned, or with `kAligned` false not at all. Loads
/// are not of the kind for constant memory (__ldg): peers may have written what is read.
template <int kBytes, bool kAligned = true>
struct Words;

template <>
struct Words<16> {
  static constexpr int kBytes = 16;
  std::uint32_t words[4];

  __device__ void load(const std::byte* in) {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(in));
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }
  __device__ void loadShared(const std::byte* in) {
    const uint4 v = *reinterpret_cast<const uint4*>(in);
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }
  __device__ void store(std::byte* out) const {
    __stcs(reinterpret_cast<uint4*>(out), make_uint4(words[0], words[1], words[2], words[3]));
  }
};

template <>
struct Words<8> {
  static constexpr int kBytes = 8;
  std::uint32_t words[2];

  __device__ void load(const std::byte* in) {
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(in));
    words[0] = v.x;
    words[1] = v.y;
  }
  __device__ void store(std::byte* out) const {
    __stcs(reinterpret_cast<uint2*>(out), make_uint2(words[0], words[1]));
  }
};

template <>
struct Words<4> {
  static constexpr int kBytes = 4;
  std::uint32_t words[1];

  __device__ void load(const std::byte* in) {
    words[0] = __ldcs(reinterpret_cast<const unsigned*>(in));
  }
  __device__ void store(std::byte* out) const { *reinterpret_cast<std::uint32_t*>(out) = words[0]; }
};

template <>
struct Words<2> {
  static constexpr int kBytes = 2;
  std::uint32_t words[1];

  __device__ void load(const std::byte* in) {
    words[0] = __ldcs(reinterpret_cast<const unsigned short*>(in));
  }
  __device__ void store(std::byte* out) const {
    *reinterpret_cast<std::uint16_t*>(out) = static_cast<std::uint16_t>(words[0]);
  }
};

/// At most four bytes, one by one.
template <int kCount>
struct Words<kCount, false> {
  static constexpr int kBytes = kCount;
  static_assert(kCount <= 4);
  std::uint32_t words[1];

  __device__ void load(const std::byte* in) {
    words[0] = 0;
#pragma unroll
    for (int i = 0; i < kBytes; ++i) words[0] |= static_cast<std::uint32_t>(in[i]) << (8 * i);
  }
  __device__ void store(std::byte* out) const {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) out[i] = static_cast<std::byte>(words[0] >> (8 * i));
  }
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_WORDS_CUH_
