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

/// A group of bfloat16, as float8.
struct Avx2Group {
  static std::uint16_t largest(const std::byte* elements) {
    __m256i most = _mm256_setzero_si256();
    for (std::size_t i = 0; i < kGroupSize; i += 16) {
      const __m256i magnitudes =
          _mm256_and_si256(loadVector(elements + i * 2), _mm256_set1_epi16(0x7FFF));
      const __m256i isNan = _mm256_cmpgt_epi16(magnitudes, _mm256_set1_epi16(0x7F80));
      most = _mm256_max_epu16(most, _mm256_andnot_si256(isNan, magnitudes));
    }
    const __m128i half =
        _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    // There is an instruction for the least of eight, and none for the largest.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
    return static_cast<std::uint16_t>(~_mm_extract_epi16(least, 0));
  }

  static void round(const std::byte* elements, float scale, std::byte* out) {
    for (std::size_t i = 0; i < kGroupSize; i += 32) {
      const __m256i low = _mm256_packus_epi32(roundEight(elements + i * 2, scale),
                                              roundEight(elements + i * 2 + 16, scale));
      const __m256i high = _mm256_packus_epi32(roundEight(elements + i * 2 + 32, scale),
                                               roundEight(elements + i * 2 + 48, scale));
      // Packing works within halves of a vector: groups of four come out as 0 2 4 6, 1 3 5 7.
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
    }
  }

  static __m256i constant(std::uint32_t value) {
    return _mm256_set1_epi32(static_cast<int>(value));
  }

  static __m256i roundEight(const std::byte* elements, float scale) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(elements));
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    const __m256 values = _mm256_mul_ps(_mm256_castsi256_ps(wide), _mm256_set1_ps(scale));
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i magnitude = _mm256_and_si256(bits, constant(0x7FFFFFFFu));
    // A carry out of the mantissa rightly raises the exponent.
    const __m256i rebased = _mm256_sub_epi32(magnitude, constant(Float8::kRebias));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(rebased, 20), constant(1));
    const __m256i raised = _mm256_add_epi32(rebased, constant(Float8::kHalf));
    const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(raised, odd), 20);
    const __m256 shifted =
        _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(Float8::kDenormalShift));
    const __m256i denormal = _mm256_and_si256(_mm256_castps_si256(shifted), constant(0xF));
    const __m256i isSmall = _mm256_cmpgt_epi32(constant(Float8::kLeastNormal), magnitude);
    const __m256i rounded = _mm256_blendv_epi8(normal, denormal, isSmall);
    const __m256i finite = _mm256_min_epu32(rounded, constant(Float8::kLargest));
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), constant(0x80));
    const __m256i isNan = _mm256_cmpgt_epi32(magnitude, constant(Float8::kInfinity));
    return _mm256_blendv_epi8(_mm256_or_si256(finite, sign), constant(Float8::kNan), isNan);
  }
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
    &quantizeRow<Avx2Group>};

}  // namespace mscclpp_ep::cpu
