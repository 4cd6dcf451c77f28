// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/numeric.hpp"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace mscclpp_ep {
namespace {

/// A format as the standard describes it, for a reference that shares no code with the library.
struct Format {
  int exponentBits;
  int mantissaBits;

  int bias() const { return (1 << (exponentBits - 1)) - 1; }
  unsigned infinity() const { return ((1u << exponentBits) - 1) << mantissaBits; }
};

constexpr Format kBfloat16{8, 7};
constexpr Format kFloat16{5, 10};

double decode(const Format& format, unsigned bits) {
  const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
  const unsigned magnitude = bits & 0x7FFFu;
  if (magnitude > format.infinity()) return std::numeric_limits<double>::quiet_NaN();
  if (magnitude == format.infinity()) return sign * std::numeric_limits<double>::infinity();
  const int exponent = static_cast<int>(magnitude >> format.mantissaBits);
  const int mantissa = static_cast<int>(magnitude & ((1u << format.mantissaBits) - 1));
  const int unit = (exponent == 0 ? 1 : exponent) - format.bias() - format.mantissaBits;
  const int implied = exponent == 0 ? 0 : 1 << format.mantissaBits;
  return sign * std::ldexp(implied + mantissa, unit);
}

/// To nearest even. Magnitudes of floats only, whose quotient by any unit is exact in a double.
unsigned encode(const Format& format, double value) {
  if (std::isnan(value)) return 0x7FFF;
  const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
  const double magnitude = std::fabs(value);
  if (std::isinf(value)) return sign | format.infinity();
  const int leastExponent = 1 - format.bias();
  const int exponent = magnitude == 0 ? leastExponent : std::ilogb(magnitude);
  const int unit = (exponent < leastExponent ? leastExponent : exponent) - format.mantissaBits;
  const double scaled = std::ldexp(magnitude, -unit);
  double whole = std::floor(scaled);
  const double left = scaled - whole;
  if (left > 0.5 || (left == 0.5 && std::fmod(whole, 2) == 1)) whole += 1;
  const int field = unit + format.mantissaBits + format.bias();  // 1 for denormals
  const unsigned bits = static_cast<unsigned>(
      (static_cast<std::int64_t>(field - 1) << format.mantissaBits) + std::llround(whole));
  return sign | (bits > format.infinity() ? format.infinity() : bits);
}

/// Floats next to everything that rounding decides by: every upper half, and every exponent and
/// mantissa that float16 keeps, each with remainders near zero, a half and one.
std::vector<std::uint32_t> interestingFloats() {
  std::vector<std::uint32_t> floats;
  for (std::uint32_t upper = 0; upper < 1u << 16; ++upper) {
    for (std::uint32_t lower : {0u, 1u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      floats.push_back(upper << 16 | lower);
    }
  }
  for (std::uint32_t upper = 0; upper < 1u << 19; upper += 3) {
    for (std::uint32_t lower : {0u, 1u, 0xFFFu, 0x1000u, 0x1001u, 0x1FFFu}) {
      floats.push_back(upper << 13 | lower);
    }
  }
  for (int quarters = 0; quarters < 4 * 1030; ++quarters) {  // of a unit of float16's denormals
    const auto bits = std::bit_cast<std::uint32_t>(std::ldexp(static_cast<float>(quarters), -26));
    floats.insert(floats.end(), {bits, bits + 1, bits - 1, bits ^ 0x80000000u});
  }
  return floats;
}

/// Not inlined, so that no compiler moves the arithmetic to another rounding mode.
[[gnu::noinline]] std::vector<std::uint16_t> convertAll(std::uint16_t (*convert)(float),
                                                        const std::vector<std::uint32_t>& floats) {
  std::vector<std::uint16_t> results;
  for (std::uint32_t bits : floats) results.push_back(convert(std::bit_cast<float>(bits)));
  return results;
}

[[gnu::noinline]] std::vector<std::uint32_t> convertAllFloat16() {
  std::vector<std::uint32_t> results;
  for (unsigned bits = 0; bits < 1u << 16; ++bits) {
    const float value = floatFromFloat16(static_cast<std::uint16_t>(bits));
    results.push_back(std::bit_cast<std::uint32_t>(value));
  }
  return results;
}

/// The number of floats that `convert` rounds otherwise than the reference.
std::size_t countWrong(const Format& format, std::uint16_t (*convert)(float)) {
  const auto floats = interestingFloats();
  const auto results = convertAll(convert, floats);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < floats.size(); ++i) {
    const unsigned expected = encode(format, static_cast<double>(std::bit_cast<float>(floats[i])));
    if (results[i] == expected) continue;
    if (wrong++ == 0) MESSAGE("first: ", floats[i], " gives ", results[i], " not ", expected);
  }
  return wrong;
}

TEST_CASE("16-bit values have the value that their format gives them") {
  std::size_t wrong = 0;
  for (unsigned bits = 0; bits < 1u << 16; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const auto isSame = [](float value, double expected) {
      if (std::isnan(expected)) return std::isnan(value);
      return value == expected && std::signbit(value) == std::signbit(expected);
    };
    if (!isSame(floatFromBfloat16(half), decode(kBfloat16, bits))) ++wrong;
    if (!isSame(floatFromFloat16(half), decode(kFloat16, bits))) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("16-bit values survive the way to float32 and back") {
  std::size_t wrong = 0;
  for (unsigned bits = 0; bits < 1u << 16; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const bool isBfloat16Nan = (bits & 0x7FFFu) > kBfloat16.infinity();
    const bool isFloat16Nan = (bits & 0x7FFFu) > kFloat16.infinity();
    if (bfloat16FromFloat(floatFromBfloat16(half)) != (isBfloat16Nan ? 0x7FFF : bits)) ++wrong;
    if (float16FromFloat(floatFromFloat16(half)) != (isFloat16Nan ? 0x7FFF : bits)) ++wrong;
  }
  CHECK(wrong == 0);
}

TEST_CASE("floats are rounded to nearest even") {
  CHECK(countWrong(kBfloat16, bfloat16FromFloat) == 0);
  CHECK(countWrong(kFloat16, float16FromFloat) == 0);
}

TEST_CASE("conversions are constants where their argument is") {
  static_assert(bfloat16FromFloat(1.0f) == 0x3F80);
  static_assert(float16FromFloat(1.0f) == 0x3C00);
  static_assert(float16FromFloat(65519.0f) == 0x7BFF);
  static_assert(float16FromFloat(65520.0f) == 0x7C00);
  static_assert(float16FromFloat(0x1p-25f) == 0x0000);
  static_assert(float16FromFloat(0x1.8p-24f) == 0x0002);
  static_assert(floatFromFloat16(0x0001) == 0x1p-24f);
  static_assert(floatFromBfloat16(0xC000) == -2.0f);
}

TEST_CASE("every NaN becomes the same") {
  for (std::uint32_t bits : {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800001u, 0xFFFFFFFFu}) {
    const float nan = std::bit_cast<float>(bits);
    CHECK(bfloat16FromFloat(nan) == 0x7FFF);
    CHECK(float16FromFloat(nan) == 0x7FFF);
    CHECK(std::bit_cast<std::uint32_t>(canonicalFloat(nan)) == 0x7FFFFFFF);
  }
  for (std::uint32_t bits : {0u, 0x80000000u, 1u, 0x7F800000u, 0xFF800000u, 0x7F7FFFFFu}) {
    CHECK(std::bit_cast<std::uint32_t>(canonicalFloat(std::bit_cast<float>(bits))) == bits);
  }
}

TEST_CASE("conversions do not depend on the modes of the processor") {
  const auto floats = interestingFloats();
  const auto bfloat16s = convertAll(bfloat16FromFloat, floats);
  const auto float16s = convertAll(float16FromFloat, floats);
  const auto fromFloat16 = convertAllFloat16();
  for (int rounding : {FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO, FE_TONEAREST}) {
    CAPTURE(rounding);
    REQUIRE(std::fesetround(rounding) == 0);
#if defined(__SSE2__)
    const unsigned saved = _mm_getcsr();
    _mm_setcsr(saved | 0x8040u);  // flush denormal results to zero, and take denormals for zero
#endif
    const bool isSame = convertAll(bfloat16FromFloat, floats) == bfloat16s &&
                        convertAll(float16FromFloat, floats) == float16s &&
                        convertAllFloat16() == fromFloat16;
#if defined(__SSE2__)
    _mm_setcsr(saved);
#endif
    std::fesetround(FE_TONEAREST);
    CHECK(isSame);
  }
}

}  // namespace
}  // namespace mscclpp_ep
