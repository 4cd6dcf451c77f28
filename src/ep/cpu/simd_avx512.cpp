// SPDX-License-Identifier: MIT
// The header of GCC 12 initialises what it leaves undefined with itself, and warns of that.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstddef>

#include "cpu/simd_loops.hpp"

// Compiled for AVX-512 F, BW, VL and DQ; see simd_loops.hpp about what may stand here.

namespace mscclpp_ep::cpu {
namespace {

struct BytesLine {
  void load(const std::byte* in) { bytes = _mm512_loadu_si512(in); }
  void store(std::byte* out) const { _mm512_storeu_si512(out, bytes); }
  void stream(std::byte* out) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(out), bytes); }

  __m512i bytes;
};

__m512 canonical(__m512 values) {
  const __mmask16 isNan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FFFFFFF));
  return _mm512_mask_mov_ps(values, isNan, nan);
}

/// 32 sums of bfloat16, those of even and of odd places apart, which saves shuffles.
struct Bfloat16Sums {
  static constexpr std::size_t kElements = 32;

  void fill(float start) { even = odd = _mm512_set1_ps(start); }

  void add(const std::byte* row) {
    const __m512i pairs = _mm512_loadu_si512(row);
    const __m512i odds = _mm512_and_si512(pairs, _mm512_set1_epi32(~0xFFFF));
    even = _mm512_add_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    odd = _mm512_add_ps(odd, _mm512_castsi512_ps(odds));
  }

  void addScaled(const std::byte* row, float weight) {
    const __m512i pairs = _mm512_loadu_si512(row);
    const __m512i odds = _mm512_and_si512(pairs, _mm512_set1_epi32(~0xFFFF));
    const __m512 scale = _mm512_set1_ps(weight);
    even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), scale, even);
    odd = _mm512_fmadd_ps(_mm512_castsi512_ps(odds), scale, odd);
  }

  BytesLine rounded() const {
    const __m512i evens = _mm512_srli_epi32(roundUpperHalves(even), 16);
    return {_mm512_mask_mov_epi16(evens, 0xAAAAAAAA, roundUpperHalves(odd))};
  }

  /// To nearest even by integers: the instructions for it take denormals for zero.
  static __m512i roundUpperHalves(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF));
    const __mmask16 isNan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i nan = _mm512_set1_epi32(0x7FFF0000);
    return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, bias), isNan, nan);
  }

  __m512 even;
  __m512 odd;
};

/// 32 sums of float16.
struct Float16Sums {
  static constexpr std::size_t kElements = 32;

  void fill(float start) { low = high = _mm512_set1_ps(start); }

  void add(const std::byte* row) {
    const auto* halves = reinterpret_cast<const __m256i*>(row);
    low = _mm512_add_ps(low, _mm512_cvtph_ps(_mm256_loadu_si256(halves)));
    high = _mm512_add_ps(high, _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1)));
  }

  void addScaled(const std::byte* row, float weight) {
    const auto* halves = reinterpret_cast<const __m256i*>(row);
    const __m512 scale = _mm512_set1_ps(weight);
    low = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm256_loadu_si256(halves)), scale, low);
    high = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm256_loadu_si256(halves + 1)), scale, high);
  }

  /// The conversion keeps the upper bits of a NaN, which makes 0x7FFF of 0x7FFFFFFF.
  BytesLine rounded() const {
    const __m256i lows = _mm512_cvtps_ph(canonical(low), _MM_FROUND_TO_NEAREST_INT);
    const __m256i highs = _mm512_cvtps_ph(canonical(high), _MM_FROUND_TO_NEAREST_INT);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(lows), highs, 1)};
  }

  __m512 low;
  __m512 high;
};

/// 16 sums of float32.
struct Float32Sums {
  static constexpr std::size_t kElements = 16;

  void fill(float start) { sums = _mm512_set1_ps(start); }
  void add(const std::byte* row) { sums = _mm512_add_ps(sums, _mm512_loadu_ps(row)); }
  void addScaled(const std::byte* row, float weight) {
    sums = _mm512_fmadd_ps(_mm512_loadu_ps(row), _mm512_set1_ps(weight), sums);
  }
  BytesLine rounded() const { return {_mm512_castps_si512(canonical(sums))}; }

  __m512 sums;
};

/// A group of bfloat16, as float8.
struct Avx512Group {
  static std::uint16_t largest(const std::byte* elements) {
    __m512i most = _mm512_setzero_si512();
    for (std::size_t i = 0; i < kGroupSize; i += 32) {
      const __m512i magnitudes =
          _mm512_and_si512(_mm512_loadu_si512(elements + i * 2), _mm512_set1_epi16(0x7FFF));
      const __mmask32 counted = _mm512_cmple_epu16_mask(magnitudes, _mm512_set1_epi16(0x7F80));
      most = _mm512_mask_max_epu16(most, counted, most, magnitudes);
    }
    const __m256i half =
        _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const __m128i quarter =
        _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // There is an instruction for the least of eight, and none for the largest.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    return static_cast<std::uint16_t>(~_mm_extract_epi16(least, 0));
  }

  static void round(const std::byte* elements, float scale, std::byte* out) {
    for (std::size_t i = 0; i < kGroupSize; i += 16) {
      const auto* halves = reinterpret_cast<const __m256i*>(elements + i * 2);
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(halves)), 16);
      const __m512 values = _mm512_mul_ps(_mm512_castsi512_ps(wide), _mm512_set1_ps(scale));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm512_cvtepi32_epi8(roundWide(_mm512_castps_si512(values))));
    }
  }

  static __m512i constant(std::uint32_t value) {
    return _mm512_set1_epi32(static_cast<int>(value));
  }

  static __m512i roundWide(__m512i bits) {
    const __m512i magnitude = _mm512_and_si512(bits, constant(0x7FFFFFFFu));
    // A carry out of the mantissa rightly raises the exponent.
    const __m512i rebased = _mm512_sub_epi32(magnitude, constant(Float8::kRebias));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(rebased, 20), constant(1));
    const __m512i raised = _mm512_add_epi32(rebased, constant(Float8::kHalf));
    const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(raised, odd), 20);
    const __m512 shifted =
        _mm512_add_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(Float8::kDenormalShift));
    const __m512i denormal = _mm512_and_si512(_mm512_castps_si512(shifted), constant(0xF));
    const __mmask16 isSmall = _mm512_cmplt_epu32_mask(magnitude, constant(Float8::kLeastNormal));
    const __m512i rounded = _mm512_mask_mov_epi32(normal, isSmall, denormal);
    const __m512i finite = _mm512_min_epu32(rounded, constant(Float8::kLargest));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), constant(0x80));
    const __mmask16 isNan = _mm512_cmpgt_epu32_mask(magnitude, constant(Float8::kInfinity));
    return _mm512_mask_mov_epi32(_mm512_or_si512(finite, sign), isNan, constant(Float8::kNan));
  }
};

template <class Sums>
struct SumLine : Sums {
  static constexpr std::size_t kLinesAtOnce = 4;

  void store(std::byte* out) const { this->rounded().store(out); }
  void stream(std::byte* out) const { this->rounded().stream(out); }
};

}  // namespace

constinit const RowKernels kAvx512Kernels = {
    "avx512",
    &streamCopy<BytesLine>,
    &cachedCopy<BytesLine>,
    {&sumRows<SumLine<Bfloat16Sums>>, &sumRows<SumLine<Float16Sums>>,
     &sumRows<SumLine<Float32Sums>>},
    {&weightedSumRows<SumLine<Bfloat16Sums>>, &weightedSumRows<SumLine<Float16Sums>>,
     &weightedSumRows<SumLine<Float32Sums>>},
    &quantizeRow<Avx512Group>};

}  // namespace mscclpp_ep::cpu
