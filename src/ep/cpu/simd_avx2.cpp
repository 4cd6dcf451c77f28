// SPDX-License-Identifier: MIT
#include <immintrin.h>

#include <cstddef>

#include "cpu/simd_loops.hpp"

// Compiled for AVX2, F16C and FMA; see simd_loops.hpp about what may stand here.

namespace mscclpp_ep::cpu {
namespace {

__m256i loadVector(const std::byte* in) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
}

/// The two halves of a line.
struct BytesLine {
  void load(const std::byte* in) {
    low = loadVector(in);
    high = loadVector(in + sizeof(__m256i));
  }

  void store(std::byte* out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out) + 1, high);
  }

  void stream(std::byte* out) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + 1, high);
  }

  __m256i low;
  __m256i high;
};

__m256 canonical(__m256 values) {
  const __m256 isNan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
  const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_blendv_ps(values, nan, isNan);
}

/// 16 sums of bfloat16, those of even and of odd places apart, which saves shuffles.
struct Bfloat16Sums {
  void fill(float start) { even = odd = _mm256_set1_ps(start); }

  void add(const std::byte* row) {
    const __m256i pairs = loadVector(row);
    const __m256i odds = _mm256_and_si256(pairs, _mm256_set1_epi32(~0xFFFF));
    even = _mm256_add_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
    odd = _mm256_add_ps(odd, _mm256_castsi256_ps(odds));
  }

  void addScaled(const std::byte* row, float weight) {
    const __m256i pairs = loadVector(row);
    const __m256i odds = _mm256_and_si256(pairs, _mm256_set1_epi32(~0xFFFF));
    const __m256 scale = _mm256_set1_ps(weight);
    even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), scale, even);
    odd = _mm256_fmadd_ps(_mm256_castsi256_ps(odds), scale, odd);
  }

  __m256i rounded() const {
    const __m256i evens = _mm256_srli_epi32(roundUpperHalves(even), 16);
    return _mm256_blend_epi16(evens, roundUpperHalves(odd), 0xAA);
  }

  /// To nearest even by integers: the instructions for it take denormals for zero.
  static __m256i roundUpperHalves(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF));
    const __m256 sums = _mm256_castsi256_ps(_mm256_add_epi32(bits, bias));
    const __m256 isNan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFF0000));
    return _mm256_castps_si256(_mm256_blendv_ps(sums, nan, isNan));
  }

  __m256 even;
  __m256 odd;
};

/// 16 sums of float16.
struct Float16Sums {
  void fill(float start) { low = high = _mm256_set1_ps(start); }

  void add(const std::byte* row) {
    const auto* halves = reinterpret_cast<const __m128i*>(row);
    low = _mm256_add_ps(low, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
    high = _mm256_add_ps(high, _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
  }

  void addScaled(const std::byte* row, float weight) {
    const auto* halves = reinterpret_cast<const __m128i*>(row);
    const __m256 scale = _mm256_set1_ps(weight);
    low = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(halves)), scale, low);
    high = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(halves + 1)), scale, high);
  }

  /// The conversion keeps the upper bits of a NaN, which makes 0x7FFF of 0x7FFFFFFF.
  __m256i rounded() const {
    return _mm256_set_m128i(_mm256_cvtps_ph(canonical(high), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(canonical(low), _MM_FROUND_TO_NEAREST_INT));
  }

  __m256 low;
  __m256 high;
};

/// 8 sums of float32.
struct Float32Sums {
  void fill(float start) { sums = _mm256_set1_ps(start); }

  void add(const std::byte* row) {
    sums = _mm256_add_ps(sums, _mm256_castsi256_ps(loadVector(row)));
  }

  void addScaled(const std::byte* row, float weight) {
    sums = _mm256_fmadd_ps(_mm256_castsi256_ps(loadVector(row)), _mm256_set1_ps(weight), sums);
  }

  __m256i rounded() const { return _mm256_castps_si256(canonical(sums)); }

  __m256 sums;
};

/// A line from two vectors of sums.
template <class Sums, std::size_t kElementBytes, std::size_t kLines>
struct SumLine {
  static constexpr std::size_t kElements = kLineBytes / kElementBytes;
  static constexpr std::size_t kLinesAtOnce = kLines;  // such that the sums take 8 registers

  void fill(float start) {
    low.fill(start);
    high.fill(start);
  }

  void add(const std::byte* row) {
    low.add(row);
    high.add(row + sizeof(__m256i));
  }

  void addScaled(const std::byte* row, float weight) {
    low.addScaled(row, weight);
    high.addScaled(row + sizeof(__m256i), weight);
  }

  void store(std::byte* out) const { rounded().store(out); }
  void stream(std::byte* out) const { rounded().stream(out); }
  BytesLine rounded() const { return {low.rounded(), high.rounded()}; }

  Sums low;
  Sums high;
};

}  // namespace

constinit const RowKernels kAvx2Kernels = {
    "avx2",
    &streamCopy<BytesLine>,
    &cachedCopy<BytesLine>,
    {&sumRows<SumLine<Bfloat16Sums, 2, 2>>, &sumRows<SumLine<Float16Sums, 2, 2>>,
     &sumRows<SumLine<Float32Sums, 4, 4>>},
    {&weightedSumRows<SumLine<Bfloat16Sums, 2, 2>>, &weightedSumRows<SumLine<Float16Sums, 2, 2>>,
     &weightedSumRows<SumLine<Float32Sums, 4, 4>>},
    &quantizeRow<BytesLine>};

}  // namespace mscclpp_ep::cpu
