// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/simd.hpp"
#include "cpu/simd_loops.hpp"
#include "support/bytes.hpp"

namespace mscclpp_ep::cpu {
namespace {

using testing::FencedBytes;
using testing::GuardedBytes;

constexpr unsigned kLargest = 0x7E;  // 448
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The reference shares no code with the library: the values of e4m3 in a table, and the nearest.

std::array<double, kLargest + 1> magnitudes() {
  std::array<double, kLargest + 1> table{};
  for (unsigned code = 0; code <= kLargest; ++code) {
    const int exponent = static_cast<int>(code >> 3);
    const int mantissa = static_cast<int>(code & 7);
    table[code] =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  }
  return table;
}

std::uint8_t nearestFloat8(float value) {
  static const auto table = magnitudes();
  if (std::isnan(value)) return 0x7F;
  const unsigned sign = std::signbit(value) ? 0x80 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto above = std::lower_bound(table.begin(), table.end(), magnitude);
  auto code = static_cast<unsigned>(above - table.begin());
  if (above == table.end()) return static_cast<std::uint8_t>(kLargest | sign);
  if (code > 0) {
    const double up = table[code] - magnitude;
    const double down = magnitude - table[code - 1];
    if (down < up || (down == up && code % 2 == 1)) --code;
  }
  return static_cast<std::uint8_t>(code | sign);
}

float fromBfloat16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

struct Quantised {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
};

Quantised reference(const std::vector<std::uint16_t>& row, bool powersOfTwo) {
  Quantised result;
  for (std::size_t begin = 0; begin < row.size(); begin += 128) {
    const std::size_t end = std::min(row.size(), begin + 128);
    float most = 1e-4F;
    for (std::size_t i = begin; i < end; ++i) {
      const float magnitude = std::fabs(fromBfloat16(row[i]));
      if (magnitude > most) most = magnitude;  // which a NaN is not
    }
    float scale = 448.0F / most;
    float inverse = most * (1.0F / 448.0F);
    if (powersOfTwo && !std::isinf(most)) {
      int exponent = 0;
      if (std::frexp(inverse, &exponent) == 0.5F) --exponent;
      inverse = std::ldexp(1.0F, exponent);
      scale = std::ldexp(1.0F, -exponent);
    }
    result.scales.push_back(inverse);
    for (std::size_t i = begin; i < end; ++i) {
      const volatile float scaled = fromBfloat16(row[i]) * scale;
      result.codes.push_back(nearestFloat8(scaled));
    }
  }
  return result;
}

/// What is wrong with what any of the kernels makes of a row, or nothing.
std::string mismatch(const std::vector<std::uint16_t>& row, bool powersOfTwo,
                     std::size_t outOffset = 0, std::size_t inOffset = 0) {
  const Quantised expected = reference(row, powersOfTwo);
  GuardedBytes in(row.size() * 2, inOffset * 2);
  if (!row.empty()) std::memcpy(in.data(), row.data(), row.size() * 2);
  for (const RowKernels* kernels : availableRowKernels()) {
    GuardedBytes out(row.size(), outOffset);
    GuardedBytes scales(expected.scales.size() * 4, outOffset % 16 * 4);
    kernels->quantize(out.data(), reinterpret_cast<float*>(scales.data()), in.data(), row.size(),
                      powersOfTwo);
    const std::string what = std::string(kernels->name) + " n " + std::to_string(row.size()) +
                             (powersOfTwo ? " powers of two" : "") + " offsets " +
                             std::to_string(outOffset) + ", " + std::to_string(inOffset);
    if (!out.isGuardIntact()) return what + ": wrote outside of the row";
    if (!scales.isGuardIntact()) return what + ": wrote outside of the scales";
    for (std::size_t i = 0; i < expected.scales.size(); ++i) {
      if (std::memcmp(scales.data() + i * 4, &expected.scales[i], 4) == 0) continue;
      return what + ": another scale of group " + std::to_string(i);
    }
    for (std::size_t i = 0; i < row.size(); ++i) {
      const auto got = static_cast<unsigned>(out.data()[i]);
      if (got == expected.codes[i]) continue;
      return what + ": element " + std::to_string(i) + " of bits " + std::to_string(row[i]) +
             " is " + std::to_string(got) + ", not " + std::to_string(expected.codes[i]);
    }
  }
  return "";
}

TEST_CASE("the reference knows the values that define e4m3") {
  CHECK(magnitudes()[1] == 0x1p-9);
  CHECK(magnitudes()[8] == 0x1p-6);
  CHECK(magnitudes()[0x38] == 1);
  CHECK(magnitudes()[kLargest] == 448);
  CHECK(nearestFloat8(17) == nearestFloat8(16));  // 17 is half-way to 18, which is odd
  CHECK(nearestFloat8(19) == nearestFloat8(20));
  CHECK(nearestFloat8(-kInfinity) == 0xFE);
}

TEST_CASE("floats round to the nearest e4m3, ties to even, and do not overflow") {
  std::size_t wrong = 0;
  const auto check = [&](std::uint32_t bits) {
    const auto value = std::bit_cast<float>(bits);
    wrong += float8FromFloat(value) != nearestFloat8(value);
  };
  // Values half-way between two of e4m3 end in 19 zeros at least, or 12 where they are denormal.
  for (std::uint32_t upper = 0; upper < 1u << 20; ++upper) {
    for (std::uint32_t lower : {0u, 1u, 0x800u, 0xFFFu}) check(upper << 12 | lower);
  }
  std::mt19937 random(4321);
  for (int i = 0; i < 1000000; ++i) check(static_cast<std::uint32_t>(random()));
  CHECK(wrong == 0);
}

TEST_CASE("every bfloat16 is quantised below maxima of every size") {
  const std::uint16_t maxima[] = {0x0000, 0x0001, 0x007F, 0x0080, 0x38D1, 0x38D2, 0x3C00, 0x3F7F,
                                  0x3F80, 0x3F81, 0x3FE0, 0x4060, 0x43DF, 0x43E0, 0x43E1, 0x4360,
                                  0x5E12, 0x7F00, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0};
  for (const std::uint16_t most : maxima) {
    const unsigned limit = most & 0x7FFFu;
    std::vector<std::uint16_t> row;
    for (unsigned bits = 0; bits < 1u << 16; ++bits) {
      const unsigned magnitude = bits & 0x7FFFu;
      if (magnitude > limit && magnitude <= 0x7F80u) continue;
      if (row.size() % 128 == 0) row.push_back(most);
      row.push_back(static_cast<std::uint16_t>(bits));
    }
    CAPTURE(most);
    CHECK(mismatch(row, false) == "");
    CHECK(mismatch(row, true) == "");
  }
}

TEST_CASE("every bfloat16 sets the scale") {
  std::vector<std::uint16_t> row;
  std::mt19937 random(1234);
  for (unsigned bits = 0; bits < 1u << 16; bits += 3) {
    for (unsigned i = 0; i < 127; ++i) {
      // A value between the largest magnitude and a 4096th of it.
      const unsigned magnitude = bits & 0x7FFFu;
      const unsigned below = static_cast<unsigned>(random()) % (12u << 7);
      const unsigned value = magnitude > below ? magnitude - below : 0;
      row.push_back(static_cast<std::uint16_t>(value | (random() & 0x8000u)));
    }
    row.push_back(static_cast<std::uint16_t>(bits));
    if (row.size() < 128 * 512) continue;
    CHECK(mismatch(row, false) == "");
    CHECK(mismatch(row, true) == "");
    row.clear();
  }
}

TEST_CASE("rows of every length are quantised at every alignment") {
  std::mt19937 random(99);
  for (std::size_t n = 0; n <= 300; ++n) {
    std::vector<std::uint16_t> row(n);
    for (std::uint16_t& element : row) element = static_cast<std::uint16_t>(random());
    CHECK(mismatch(row, n % 2 == 0, n % 64, n * 5 % 32) == "");
    // Like magnitudes, so that not all is 0 beside the largest.
    for (std::uint16_t& element : row) {
      element = static_cast<std::uint16_t>((random() & 0x83FFu) + 0x3C00u);
    }
    CHECK(mismatch(row, n % 2 == 1, n * 3 % 64, n % 32) == "");
  }
}

TEST_CASE("elements beyond a short row do not count") {
  const FencedBytes in(1);
  const FencedBytes out(1);
  std::memset(in.begin(), 0x40, 65536);
  for (const RowKernels* kernels : availableRowKernels()) {
    for (std::size_t n : {0u, 1u, 63u, 127u, 128u, 129u, 255u, 300u}) {
      std::array<float, 3> scales = {-1, -1, -1};
      kernels->quantize(out.end() - n, scales.data(), in.end() - 2 * n, n, false);
      kernels->quantize(out.begin(), scales.data(), in.begin(), n, true);
      kernels->quantize(out.begin(), scales.data(), in.end() - 2 * n, n, true);
      for (std::size_t i = 0; i < scales.size(); ++i) CHECK((scales[i] == -1) == (i * 128 >= n));
    }
  }
}

}  // namespace
}  // namespace mscclpp_ep::cpu
