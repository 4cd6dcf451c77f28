// SPDX-License-Identifier: MIT
// Sums of rows: in float32, in a fixed order, rounded once.
#ifndef MSCCLPP_EP_CUDA_DEVICE_REDUCE_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_REDUCE_CUH_

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/numeric.hpp"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep::cuda {

// Element types, by the bits of an element. The GPU's own conversions give what
// core/numeric.hpp does, for every input: they round to nearest even, also to denormals, and every
// NaN becomes the one whose mantissa is all ones. (Which NaN a load gives shows nowhere.)

struct Bfloat16Element {
  static constexpr int kBytes = 2;
  static constexpr int kRowsAhead = 4;
  static __device__ float load(std::uint32_t bits) {
    return floatFromBfloat16(static_cast<std::uint16_t>(bits));
  }
  static __device__ std::uint32_t round(float value) { return roundPair(value, 0.0F); }
  static __device__ std::uint32_t roundPair(float low, float high) {
    return bfloat16PairFrom(low, high);
  }
};

struct Float16Element {
  static constexpr int kBytes = 2;
  static constexpr int kRowsAhead = 4;
  static __device__ float load(std::uint32_t bits) {
    return floatFromFloat16Bits(static_cast<std::uint16_t>(bits));
  }
  static __device__ std::uint32_t round(float value) { return roundPair(value, 0.0F); }
  static __device__ std::uint32_t roundPair(float low, float high) {
    return float16PairFrom(low, high);
  }
};

struct Float32Element {
  static constexpr int kBytes = 4;
  static constexpr int kRowsAhead = 4;
  static __device__ float load(std::uint32_t bits) { return std::bit_cast<float>(bits); }
  static __device__ std::uint32_t round(float value) {
    // canonicalFloat(), which compilers for GPUs put into memory to choose between two addresses.
    const auto bits = std::bit_cast<std::uint32_t>(value);
    return selectBits(isNanBits(bits), kNan32, bits);
  }
};

/// Calls `launch` with the element type of rows that are summed: bfloat16, float16 or float32.
template <class Launch>
void withElement(DataType dtype, const Launch& launch) {
  switch (dtype) {
    case DataType::bfloat16:
      return launch(Bfloat16Element());
    case DataType::float16:
      return launch(Float16Element());
    default:
      return launch(Float32Element());
  }
}

/// Vectors of each row that a lane sums at a time. With Element::kRowsAhead, the rows that it loads
/// before it adds the first of them, this is what it has on its way.
inline constexpr int kSumVectors = 2;
inline constexpr int kSumStep = kSumVectors * kWarpSize;

/// The sums of the elements of one vector.
template <class Element, class Vector>
struct VectorSum {
  static constexpr int kElements = Vector::kBytes / Element::kBytes;
  static constexpr int kPerWord = 4 / Element::kBytes;
  static constexpr int kBits = 8 * Element::kBytes;
  float sums[kElements];

  __device__ __forceinline__ void fill(float start) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) sums[i] = start;
  }

  __device__ __forceinline__ void add(const Vector& row) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      sums[i] += Element::load(row.words[i / kPerWord] >> (i % kPerWord * kBits));
    }
  }

  __device__ __forceinline__ void store(std::byte* out) const {
    Vector rounded;
    if constexpr (kElements % kPerWord != 0 || kPerWord == 1) {
      static_assert(kElements == 1 || kPerWord == 1);
#pragma unroll
      for (int i = 0; i < kElements; ++i) rounded.words[i] = Element::round(sums[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        rounded.words[i / 2] = Element::roundPair(sums[i], sums[i + 1]);
      }
    }
    rounded.store(out);
  }
};

/// A step of a row in the making: this lane's vectors, which are at `offsets` in every row.
template <class Element, class Vector>
struct StepSum {
  VectorSum<Element, Vector> vectors[kSumVectors];
  std::int64_t offsets[kSumVectors];

  /// A lane beyond `end` reads the last vector, and so needs no conditions.
  __device__ __forceinline__ StepSum(float start, std::int64_t at, std::int64_t end) {
#pragma unroll
    for (int i = 0; i < kSumVectors; ++i) {
      const std::int64_t mine = at + i * kWarpSize + laneIndex();
      offsets[i] = (mine < end ? mine : end - 1) * Vector::kBytes;
      vectors[i].fill(start);
    }
  }

  /// Adds the next `kRows` of the rows `myRow` of `lanes`.
  template <int kRows>
  __device__ __forceinline__ void addRows(const std::byte* myRow, unsigned& lanes) {
    Vector loaded[kRows][kSumVectors];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const std::byte* in = broadcast(myRow, takeLowest(lanes));
#pragma unroll
      for (int i = 0; i < kSumVectors; ++i) loaded[row][i].load(in + offsets[i]);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kSumVectors; ++i) vectors[i].add(loaded[row][i]);
    }
  }

  /// Adds the rows `myRow` of all `lanes` in ascending order.
  __device__ __forceinline__ void add(const std::byte* myRow, unsigned lanes) {
    int left = __popc(lanes);
    for (; left >= Element::kRowsAhead; left -= Element::kRowsAhead) {
      addRows<Element::kRowsAhead>(myRow, lanes);
    }
    addLast<Element::kRowsAhead - 1>(myRow, lanes, left);
  }

  /// Adds the rows of all `lanes`, which are `left`, at most `kRows`.
  template <int kRows>
  __device__ __forceinline__ void addLast(const std::byte* myRow, unsigned lanes, int left) {
    if (left == kRows) {
      addRows<kRows>(myRow, lanes);
    } else if constexpr (kRows > 1) {
      addLast<kRows - 1>(myRow, lanes, left);
    }
  }

  __device__ __forceinline__ void store(std::byte* out, std::int64_t at, std::int64_t end) const {
#pragma unroll
    for (int i = 0; i < kSumVectors; ++i) {
      if (at + i * kWarpSize + laneIndex() < end) vectors[i].store(out + offsets[i]);
    }
  }
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_REDUCE_CUH_
