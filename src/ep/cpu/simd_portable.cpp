// SPDX-License-Identifier: MIT
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "core/numeric.hpp"
#include "cpu/simd_loops.hpp"

static_assert(FLT_EVAL_METHOD == 0, "float32 sums must be made in float32: compile for SSE2");

namespace mscclpp_ep::cpu {
namespace {

/// Writes a line past the cache where the processor's baseline can do that.
inline void streamLine(std::byte* out, const std::byte* line) {
#if defined(__SSE2__)
  for (std::size_t i = 0; i < kLineBytes; i += sizeof(__m128i)) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), part);
  }
#else
  std::memcpy(out, line, kLineBytes);
#endif
}

/// A group of bfloat16, as float8.
struct PortableGroup {
  static std::uint16_t element(const std::byte* elements, std::size_t i) {
    std::uint16_t bits;
    std::memcpy(&bits, elements + i * sizeof(bits), sizeof(bits));
    return bits;
  }

  static std::uint16_t largest(const std::byte* elements) {
    std::uint16_t most = 0;
    for (std::size_t i = 0; i < kGroupSize; ++i) {
      const auto magnitude = static_cast<std::uint16_t>(element(elements, i) & 0x7FFFu);
      if (magnitude <= 0x7F80u && magnitude > most) most = magnitude;
    }
    return most;
  }

  static void round(const std::byte* elements, float scale, std::byte* out) {
    for (std::size_t i = 0; i < kGroupSize; ++i) {
      out[i] = std::byte{float8FromFloat(floatFromBfloat16(element(elements, i)) * scale)};
    }
  }
};

void plainCopy(void* out, const void* in, std::size_t n) {
  if (n != 0) std::memcpy(out, in, n);
}

#if defined(__SSE2__)
struct BytesLine {
  void load(const std::byte* in) { std::memcpy(bytes, in, kLineBytes); }
  void stream(std::byte* out) const { streamLine(out, bytes); }

  alignas(kLineBytes) std::byte bytes[kLineBytes];
};
constexpr auto* kStreamCopy = &streamCopy<BytesLine>;
#else
constexpr auto* kStreamCopy = &plainCopy;
#endif

// The loops have a fixed length and no branches: compilers make vectors of them.

struct Float16 {
  using Bits = std::uint16_t;
  static float load(Bits bits) { return floatFromFloat16(bits); }
  static Bits round(float value) { return float16FromFloat(value); }
};

struct Float32 {
  using Bits = float;
  static float load(Bits value) { return value; }
  static Bits round(float value) { return canonicalFloat(value); }
};

template <class Element>
struct Sums {
  using Bits = typename Element::Bits;
  static constexpr std::size_t kElements = kLineBytes / sizeof(Bits);

  void fill(float start) {
    for (float& sum : sums) sum = start;
  }

  void add(const std::byte* row) {
    Bits elements[kElements];
    std::memcpy(elements, row, kLineBytes);
    for (std::size_t i = 0; i < kElements; ++i) sums[i] += Element::load(elements[i]);
  }

  void addScaled(const std::byte* row, float weight) {
    Bits elements[kElements];
    std::memcpy(elements, row, kLineBytes);
    for (std::size_t i = 0; i < kElements; ++i) {
      sums[i] = std::fma(Element::load(elements[i]), weight, sums[i]);
    }
  }

  void store(std::byte* out) const {
    Bits elements[kElements];
    for (std::size_t i = 0; i < kElements; ++i) elements[i] = Element::round(sums[i]);
    std::memcpy(out, elements, kLineBytes);
  }

  alignas(kLineBytes) float sums[kElements];
};

/// Sums of bfloat16, taken two elements to a word, which spares compilers the packing of halves.
struct Bfloat16Sums {
  static constexpr std::size_t kElements = kLineBytes / 2;
  static constexpr std::size_t kWords = kLineBytes / sizeof(std::uint32_t);

  void fill(float start) {
    for (float& sum : lower) sum = start;
    for (float& sum : upper) sum = start;
  }

  void add(const std::byte* row) {
    std::uint32_t words[kWords];
    std::memcpy(words, row, kLineBytes);
    for (std::size_t i = 0; i < kWords; ++i) lower[i] += std::bit_cast<float>(words[i] << 16);
    for (std::size_t i = 0; i < kWords; ++i) upper[i] += std::bit_cast<float>(words[i] & ~0xFFFFu);
  }

  void addScaled(const std::byte* row, float weight) {
    std::uint32_t words[kWords];
    std::memcpy(words, row, kLineBytes);
    for (std::size_t i = 0; i < kWords; ++i) {
      lower[i] = std::fma(std::bit_cast<float>(words[i] << 16), weight, lower[i]);
      upper[i] = std::fma(std::bit_cast<float>(words[i] & ~0xFFFFu), weight, upper[i]);
    }
  }

  void store(std::byte* out) const {
    std::uint32_t words[kWords];
    for (std::size_t i = 0; i < kWords; ++i) {
      const std::uint32_t high = bfloat16FromFloat(upper[i]);
      words[i] = high << 16 | bfloat16FromFloat(lower[i]);
    }
    std::memcpy(out, words, kLineBytes);
  }

  alignas(kLineBytes) float lower[kWords];
  alignas(kLineBytes) float upper[kWords];
};

template <class Sums>
struct SumLine : Sums {
  static constexpr std::size_t kLinesAtOnce = 1;

  void stream(std::byte* out) const {
    alignas(kLineBytes) std::byte line[kLineBytes];
    this->store(line);
    streamLine(out, line);
  }
};

}  // namespace

constinit const RowKernels kPortableKernels = {
    "portable",
    kStreamCopy,
    &plainCopy,
    {&sumRows<SumLine<Bfloat16Sums>>, &sumRows<SumLine<Sums<Float16>>>,
     &sumRows<SumLine<Sums<Float32>>>},
    {&weightedSumRows<SumLine<Bfloat16Sums>>, &weightedSumRows<SumLine<Sums<Float16>>>,
     &weightedSumRows<SumLine<Sums<Float32>>>},
    &quantizeRow<PortableGroup>};

}  // namespace mscclpp_ep::cpu
