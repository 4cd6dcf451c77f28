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
    &quantizeRow<BytesLine>};

}  // namespace mscclpp_ep::cpu
