// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

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
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "cpu/simd_loops.hpp"
#include "mscclpp_ep/error.hpp"
#include "support/bytes.hpp"

namespace mscclpp_ep::cpu {
namespace {

using testing::FencedBytes;
using testing::GuardedBytes;

constexpr std::array kTypes = {SumType::bfloat16, SumType::float16, SumType::float32};

std::size_t elementSize(SumType type) { return type == SumType::float32 ? 4 : 2; }

// The reference shares no code with the library: formats as the standard describes them, and sums
// in double, which rounds to the float32 sum of two float32 values.

int mantissaBits(SumType type) { return type == SumType::bfloat16 ? 7 : 10; }
int exponentBias(SumType type) { return type == SumType::bfloat16 ? 127 : 15; }
unsigned infinityBits(SumType type) { return type == SumType::bfloat16 ? 0x7F80 : 0x7C00; }

float decode(SumType type, std::uint32_t bits) {
  if (type == SumType::float32) return std::bit_cast<float>(bits);
  const float sign = (bits & 0x8000u) != 0 ? -1.0f : 1.0f;
  const unsigned magnitude = bits & 0x7FFFu;
  if (magnitude > infinityBits(type)) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude == infinityBits(type)) return sign * std::numeric_limits<float>::infinity();
  const int exponent = static_cast<int>(magnitude >> mantissaBits(type));
  const int mantissa = static_cast<int>(magnitude & ((1u << mantissaBits(type)) - 1));
  const int unit = (exponent == 0 ? 1 : exponent) - exponentBias(type) - mantissaBits(type);
  const int implied = exponent == 0 ? 0 : 1 << mantissaBits(type);
  return sign * std::ldexp(static_cast<float>(implied + mantissa), unit);
}

std::uint32_t encode(SumType type, float value) {
  if (std::isnan(value)) return type == SumType::float32 ? 0x7FFFFFFFu : 0x7FFFu;
  if (type == SumType::float32) return std::bit_cast<std::uint32_t>(value);
  const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(value)) return sign | infinityBits(type);
  const int leastExponent = 1 - exponentBias(type);
  const int exponent = magnitude == 0 ? leastExponent : std::ilogb(magnitude);
  const int unit = (exponent < leastExponent ? leastExponent : exponent) - mantissaBits(type);
  const double scaled = std::ldexp(magnitude, -unit);
  double whole = std::floor(scaled);
  const double left = scaled - whole;
  if (left > 0.5 || (left == 0.5 && std::fmod(whole, 2) == 1)) whole += 1;
  const int field = unit + mantissaBits(type) + exponentBias(type);  // 1 for denormals
  const auto bits = static_cast<unsigned>(
      (static_cast<std::int64_t>(field - 1) << mantissaBits(type)) + std::llround(whole));
  return sign | (bits > infinityBits(type) ? infinityBits(type) : bits);
}

std::uint32_t loadElement(SumType type, const std::byte* address) {
  std::uint32_t bits = 0;
  std::uint16_t half;
  if (type == SumType::float32) {
    std::memcpy(&bits, address, sizeof(bits));
  } else {
    std::memcpy(&half, address, sizeof(half));
    bits = half;
  }
  return bits;
}

void storeElement(SumType type, std::byte* address, std::uint32_t bits) {
  const auto half = static_cast<std::uint16_t>(bits);
  if (type == SumType::float32) {
    std::memcpy(address, &bits, sizeof(bits));
  } else {
    std::memcpy(address, &half, sizeof(half));
  }
}

std::uint32_t referenceSum(SumType type, const std::vector<const void*>& rows, std::size_t j,
                           float start) {
  float sum = start;
  for (const void* row : rows) {
    const auto* element = static_cast<const std::byte*>(row) + j * elementSize(type);
    const float value = decode(type, loadElement(type, element));
    sum = static_cast<float>(static_cast<double>(sum) + static_cast<double>(value));
  }
  return encode(type, sum);
}

/// Random bits, half of them replaced by values at which something special happens.
class ElementSource {
 public:
  std::uint32_t next(SumType type) {
    const auto bits = static_cast<std::uint32_t>(random_());
    if (random_() % 2 == 0) return type == SumType::float32 ? bits : bits & 0xFFFFu;
    const std::uint32_t sign = bits & 1;
    if (type == SumType::float32) {
      static constexpr std::array<std::uint32_t, 12> kSpecial = {
          0,          1,          0x007FFFFF, 0x00800000, 0x3F800000, 0x7F7FFFFF,
          0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x33800000, 0x00000100};
      return kSpecial[random_() % kSpecial.size()] | sign << 31;
    }
    static constexpr std::array<std::uint32_t, 18> kSpecial = {
        0,      1,      2,      0x007F, 0x0080, 0x03FF, 0x0400, 0x3C00, 0x3C01,
        0x3F80, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF};
    return kSpecial[random_() % kSpecial.size()] | sign << 15;
  }

  std::size_t below(std::size_t limit) { return random_() % limit; }

 private:
  std::mt19937_64 random_{12345};
};

/// As the C library's fmaf computes it, a step a row.
std::uint32_t referenceWeightedSum(SumType type, const std::vector<const void*>& rows,
                                   const std::vector<float>& weights, std::size_t j) {
  float sum = 0.0f;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const auto* element = static_cast<const std::byte*>(rows[r]) + j * elementSize(type);
    sum = std::fma(decode(type, loadElement(type, element)), weights[r], sum);
  }
  return encode(type, sum);
}

/// What is wrong with a weighted sum by any of the kernels, or nothing.
std::string weightedSumMismatch(SumType type, const std::vector<const void*>& rows,
                                const std::vector<float>& weights, std::size_t n,
                                std::size_t outOffset) {
  std::vector<std::uint32_t> expected(n);
  for (std::size_t j = 0; j < n; ++j) expected[j] = referenceWeightedSum(type, rows, weights, j);
  for (const RowKernels* kernels : availableRowKernels()) {
    GuardedBytes out(n * elementSize(type), outOffset * elementSize(type));
    const auto index = static_cast<std::size_t>(type);
    kernels->weightedSum[index](out.data(), rows.data(), weights.data(), rows.size(), n);
    const std::string what = std::string(kernels->name) + " type " + std::to_string(index) +
                             " rows " + std::to_string(rows.size()) + " n " + std::to_string(n) +
                             " offset " + std::to_string(outOffset);
    if (!out.isGuardIntact()) return what + ": wrote outside of the row";
    for (std::size_t j = 0; j < n; ++j) {
      const auto got = loadElement(type, out.data() + j * elementSize(type));
      if (got == expected[j]) continue;
      return what + ": element " + std::to_string(j) + " is " + std::to_string(got) + ", not " +
             std::to_string(expected[j]);
    }
  }
  return "";
}

/// What is wrong with a sum of `rows` by `kernels`, or nothing.
std::string sumMismatch(const RowKernels& kernels, SumType type,
                        const std::vector<const void*>& rows, std::size_t n, std::size_t outOffset,
                        float start, bool stream) {
  GuardedBytes out(n * elementSize(type), outOffset * elementSize(type));
  const auto index = static_cast<std::size_t>(type);
  kernels.sum[index](out.data(), rows.data(), rows.size(), n, start, stream);
  streamFence();
  const std::string what = std::string(kernels.name) + " type " + std::to_string(index) + " rows " +
                           std::to_string(rows.size()) + " n " + std::to_string(n) + " offset " +
                           std::to_string(outOffset) + (stream ? " stream" : "");
  if (!out.isGuardIntact()) return what + ": wrote outside of the row";
  for (std::size_t j = 0; j < n; ++j) {
    const auto expected = referenceSum(type, rows, j, start);
    const auto got = loadElement(type, out.data() + j * elementSize(type));
    if (got == expected) continue;
    return what + ": element " + std::to_string(j) + " is " + std::to_string(got) + ", not " +
           std::to_string(expected);
  }
  return "";
}

std::string copyMismatch(const RowKernels& kernels, bool stream, std::size_t n,
                         std::size_t outOffset, std::size_t inOffset) {
  GuardedBytes out(n, outOffset);
  GuardedBytes in(n, inOffset);
  for (std::size_t i = 0; i < n; ++i) in.data()[i] = static_cast<std::byte>(i * 7 + i / 251);
  (stream ? kernels.streamCopy : kernels.copy)(out.data(), in.data(), n);
  streamFence();
  const std::string what = std::string(kernels.name) + (stream ? " streamed n " : " n ") +
                           std::to_string(n) + " out offset " + std::to_string(outOffset) +
                           " in offset " + std::to_string(inOffset);
  if (!out.isGuardIntact()) return what + ": wrote outside of the row";
  if (n != 0 && std::memcmp(out.data(), in.data(), n) != 0) return what + ": other bytes";
  return "";
}

/// Rows of random elements, each at another distance from the start of a line.
class RandomRows {
 public:
  RandomRows(ElementSource& source, SumType type, std::size_t numRows, std::size_t n) {
    for (std::size_t r = 0; r < numRows; ++r) {
      const std::size_t size = elementSize(type);
      buffers_.emplace_back(n * size, source.below(kLineBytes / size) * size);
      std::byte* row = buffers_.back().data();
      for (std::size_t j = 0; j < n; ++j) storeElement(type, row + j * size, source.next(type));
    }
    for (GuardedBytes& buffer : buffers_) pointers_.push_back(buffer.data());
  }

  const std::vector<const void*>& pointers() const { return pointers_; }

 private:
  std::vector<GuardedBytes> buffers_;
  std::vector<const void*> pointers_;
};

TEST_CASE("the sets are the portable one and faster ones") {
  const auto available = availableRowKernels();
  REQUIRE(!available.empty());
  CHECK(available.front()->name == "portable");
  CHECK(&selectRowKernels(nullptr) == available.back());
  CHECK(&selectRowKernels("") == available.back());
  for (const RowKernels* kernels : available) {
    CHECK(&selectRowKernels(std::string(kernels->name).c_str()) == kernels);
  }
  CHECK_THROWS_WITH_AS(selectRowKernels("avx"), doctest::Contains("'avx'"), InvalidArgument);
  CHECK_THROWS_WITH_AS(selectRowKernels("avx"), doctest::Contains("portable"), InvalidArgument);

  bool isAvailable = false;
  for (const RowKernels* kernels : available) isAvailable |= kernels == &rowKernels();
  CHECK(isAvailable);
}

TEST_CASE("every 16-bit value is summed alone and with a random other") {
  constexpr std::size_t kCount = 1u << 16;
  ElementSource source;
  for (SumType type : {SumType::bfloat16, SumType::float16}) {
    std::vector<std::uint16_t> all(kCount);
    std::vector<std::uint16_t> others(kCount);
    for (std::size_t i = 0; i < kCount; ++i) {
      all[i] = static_cast<std::uint16_t>(i);
      others[i] = static_cast<std::uint16_t>(source.next(type));
    }
    for (const RowKernels* kernels : availableRowKernels()) {
      CHECK(sumMismatch(*kernels, type, {all.data()}, kCount, 0, 0.0f, false) == "");
      CHECK(sumMismatch(*kernels, type, {all.data()}, kCount, 0, -0.0f, true) == "");
      CHECK(sumMismatch(*kernels, type, {all.data(), others.data()}, kCount, 0, 0.0f, true) == "");
      CHECK(sumMismatch(*kernels, type, {others.data(), all.data()}, kCount, 0, 0.0f, false) == "");
    }
  }
}

TEST_CASE("sums are right for every length, alignment and number of rows") {
  ElementSource source;
  for (SumType type : kTypes) {
    for (std::size_t n = 0; n <= 70; ++n) {
      const std::size_t numRows = n % 10;
      const RandomRows rows(source, type, numRows, n);
      const float start = decode(SumType::float32, source.next(SumType::float32));
      const std::size_t offset = source.below(kLineBytes / elementSize(type));
      for (const RowKernels* kernels : availableRowKernels()) {
        CHECK(sumMismatch(*kernels, type, rows.pointers(), n, offset, start, false) == "");
        CHECK(sumMismatch(*kernels, type, rows.pointers(), n, offset, start, true) == "");
      }
    }
  }
}

TEST_CASE("sums of long rows are right at every alignment") {
  ElementSource source;
  for (SumType type : kTypes) {
    const std::size_t offsets = kLineBytes / elementSize(type);
    for (std::size_t offset = 0; offset < offsets; ++offset) {
      const std::size_t n = 1500 + source.below(200);
      const RandomRows rows(source, type, 1 + source.below(5), n);
      for (const RowKernels* kernels : availableRowKernels()) {
        CHECK(sumMismatch(*kernels, type, rows.pointers(), n, offset, 0.0f, false) == "");
        CHECK(sumMismatch(*kernels, type, rows.pointers(), n, offset, 1.0f, true) == "");
      }
    }
  }
}

TEST_CASE("the start alone is rounded to nearest even") {
  for (SumType type : kTypes) {
    for (const RowKernels* kernels : availableRowKernels()) {
      std::string mismatch;
      for (std::uint32_t upper = 0; upper < 1u << 16 && mismatch.empty(); upper += 5) {
        for (std::uint32_t lower : {0u, 1u, 0x0FFFu, 0x1000u, 0x3000u, 0x7FFFu, 0x8000u, 0x8001u}) {
          const auto start = std::bit_cast<float>(upper << 16 | lower);
          const std::string found = sumMismatch(*kernels, type, {}, 1, 0, start, false);
          if (!found.empty()) mismatch = found;
        }
      }
      CHECK(mismatch == "");
    }
  }
}

TEST_CASE("infinities that cancel, and zeros, keep to the standard") {
  struct Case {
    std::uint32_t first, second;  // upper halves of float32
    float start;
    std::uint32_t expected;
  };
  const float nan = std::bit_cast<float>(0xFFC12345u);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Case cases[] = {{0x7F80, 0xFF80, 0.0f, 0x7FFF},      {0x7F80, 0x7F80, 0.0f, 0x7F80},
                        {0x8000, 0x8000, -0.0f, 0x8000},     {0x8000, 0x8000, 0.0f, 0x0000},
                        {0x3F80, 0xBF80, -0.0f, 0x0000},     {0x0001, 0x0001, 0.0f, 0x0002},
                        {0x0001, 0x8001, -0.0f, 0x0000},     {0x7F7F, 0x7F7F, 0.0f, 0x7F80},
                        {0x3F80, 0x3F80, nan, 0x7FFF},       {0x3F80, 0xFFC1, 0.0f, 0x7FFF},
                        {0x3F80, 0x7F80, -kInfinity, 0x7FFF}};
  for (const RowKernels* kernels : availableRowKernels()) {
    for (const Case& c : cases) {
      CAPTURE(kernels->name);
      CAPTURE(c.first);
      CAPTURE(c.second);
      const std::vector<std::uint16_t> first(40, static_cast<std::uint16_t>(c.first));
      const std::vector<std::uint16_t> second(40, static_cast<std::uint16_t>(c.second));
      const void* rows[] = {first.data(), second.data()};
      std::vector<std::uint16_t> out(40);
      kernels->sum[0](out.data(), rows, 2, out.size(), c.start, false);
      CHECK(out == std::vector<std::uint16_t>(40, static_cast<std::uint16_t>(c.expected)));

      const std::vector<std::uint32_t> firstWords(40, c.first << 16);
      const std::vector<std::uint32_t> secondWords(40, c.second << 16);
      const void* wordRows[] = {firstWords.data(), secondWords.data()};
      std::vector<std::uint32_t> words(40);
      kernels->sum[2](words.data(), wordRows, 2, words.size(), c.start, false);
      const std::uint32_t expected = c.expected == 0x7FFF ? 0x7FFFFFFFu : c.expected << 16;
      const bool overflows = c.first == 0x7F7F;  // not in float32, whose mantissa goes on
      if (!overflows) CHECK(words == std::vector<std::uint32_t>(40, expected));
    }
  }
}

TEST_CASE("the order of the additions is the order of the rows") {
  // 2^24 + 1 + 1 - 2^24 is 0 from left to right, and would be 2 in other orders.
  const std::vector<float> large(100, 0x1p24f);
  const std::vector<float> one(100, 1.0f);
  const std::vector<float> negative(100, -0x1p24f);
  const void* rows[] = {large.data(), one.data(), one.data(), negative.data()};
  for (const RowKernels* kernels : availableRowKernels()) {
    std::vector<float> out(100, 7.0f);
    kernels->sum[2](out.data(), rows, 4, out.size(), 0.0f, false);
    CHECK(out == std::vector<float>(100, 0.0f));
  }
}

TEST_CASE("weighted sums are right for every length, alignment and number of rows") {
  ElementSource source;
  for (SumType type : kTypes) {
    for (std::size_t n = 0; n <= 300; ++n) {
      const std::size_t numRows = n % 10;
      const RandomRows rows(source, type, numRows, n);
      std::vector<float> weights(numRows);
      for (float& weight : weights) {
        weight = decode(SumType::float32, source.next(SumType::float32));
      }
      const std::size_t offset = source.below(kLineBytes / elementSize(type));
      CHECK(weightedSumMismatch(type, rows.pointers(), weights, n, offset) == "");
      // Numbers of like magnitude: sums that round, rather than overflow.
      for (float& weight : weights) weight = static_cast<float>(source.below(2001)) / 1000 - 1;
      CHECK(weightedSumMismatch(type, rows.pointers(), weights, n, n % 7) == "");
    }
  }
}

TEST_CASE("weighted sums of long rows are right at every alignment") {
  ElementSource source;
  for (SumType type : kTypes) {
    for (std::size_t offset = 0; offset < kLineBytes / elementSize(type); ++offset) {
      const std::size_t n = 1500 + source.below(200);
      const RandomRows rows(source, type, 3, n);
      CHECK(weightedSumMismatch(type, rows.pointers(), {0.3f, -1.7f, 1e-3f}, n, offset) == "");
    }
  }
}

TEST_CASE("every 16-bit value is weighted, alone and after a random other") {
  constexpr std::size_t kCount = 1u << 16;
  ElementSource source;
  for (SumType type : {SumType::bfloat16, SumType::float16}) {
    std::vector<std::uint16_t> all(kCount);
    std::vector<std::uint16_t> others(kCount);
    for (std::size_t i = 0; i < kCount; ++i) {
      all[i] = static_cast<std::uint16_t>(i);
      others[i] = static_cast<std::uint16_t>(source.next(type));
    }
    for (float weight : {1.0f, 0.1f, -3.0f, 0.0f, 1e-38f, 1e38f}) {
      CHECK(weightedSumMismatch(type, {all.data()}, {weight}, kCount, 0) == "");
      CHECK(weightedSumMismatch(type, {others.data(), all.data()}, {0.7f, weight}, kCount, 0) ==
            "");
    }
  }
}

TEST_CASE("a step of a weighted sum rounds once") {
  // (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, which is lost if the product is rounded first.
  const std::vector<float> one(100, 1.0f);
  const std::vector<float> factor(100, 1.0f + 0x1p-12f);
  const void* rows[] = {one.data(), factor.data()};
  const float weights[] = {-(1.0f + 0x1p-11f), 1.0f + 0x1p-12f};
  for (const RowKernels* kernels : availableRowKernels()) {
    std::vector<float> out(100, 7.0f);
    kernels->weightedSum[2](out.data(), rows, weights, 2, out.size());
    CHECK(out == std::vector<float>(100, 0x1p-24f));
  }
}

TEST_CASE("copies are right for every length and alignment") {
  for (const RowKernels* kernels : availableRowKernels()) {
    for (const bool stream : {false, true}) {
      for (std::size_t n = 0; n <= 1200; n += n < 300 ? 1 : 13) {
        CHECK(copyMismatch(*kernels, stream, n, n % 64, n * 5 % 64) == "");
        CHECK(copyMismatch(*kernels, stream, n, 0, 0) == "");
      }
      for (std::size_t offset = 0; offset < 64; ++offset) {
        const std::size_t other = (offset * 11 + 1) % 64;
        CHECK(copyMismatch(*kernels, stream, 14336 + offset * 3, offset, other) == "");
      }
    }
    kernels->streamCopy(nullptr, nullptr, 0);
    kernels->copy(nullptr, nullptr, 0);
  }
}

TEST_CASE("nothing outside of the rows is read") {
  const FencedBytes first(1);
  const FencedBytes second(1);
  const FencedBytes out(1);
  std::memset(first.begin(), 0x11, 65536);
  std::memset(second.begin(), 0x22, 65536);
  for (const RowKernels* kernels : availableRowKernels()) {
    for (std::size_t bytes : {0u, 4u, 60u, 64u, 68u, 260u, 4100u}) {
      const auto check = [&](std::byte* to, const std::byte* a, const std::byte* b) {
        kernels->streamCopy(to, a, bytes);
        kernels->copy(to, b, bytes);
        const void* rows[] = {a, b};
        for (SumType type : kTypes) {
          const auto index = static_cast<std::size_t>(type);
          kernels->sum[index](to, rows, 2, bytes / elementSize(type), 0.0f, true);
          kernels->sum[index](to, rows, 2, bytes / elementSize(type), 0.0f, false);
          const float weights[] = {0.5f, 2.0f};
          kernels->weightedSum[index](to, rows, weights, 2, bytes / elementSize(type));
        }
      };
      check(out.end() - bytes, first.end() - bytes, second.end() - bytes);
      check(out.begin(), first.begin(), second.begin());
      check(out.begin(), first.end() - bytes, second.begin());
    }
  }
  streamFence();
}

#if defined(__SSE2__)
TEST_CASE("the modes of the caller change no result, and are restored") {
  // Toward zero, denormal results flushed, denormal operands taken for zero, exceptions masked.
  constexpr unsigned kCallersModes = 0x7F80 | 0x8040;
  constexpr unsigned kFlags = 0x3F;  // what has happened so far
  ElementSource source;
  for (SumType type : kTypes) {
    const std::size_t n = 1000;
    const RandomRows rows(source, type, 3, n);
    std::vector<std::uint32_t> expected(n);
    for (std::size_t j = 0; j < n; ++j) expected[j] = referenceSum(type, rows.pointers(), j, 0.0f);
    for (const RowKernels* kernels : availableRowKernels()) {
      std::vector<std::byte> out(n * elementSize(type));
      const unsigned saved = _mm_getcsr();
      _mm_setcsr(kCallersModes);
      {
        const FloatingPointModes modes;
        kernels->sum[static_cast<std::size_t>(type)](out.data(), rows.pointers().data(), 3, n, 0.0f,
                                                     false);
      }
      const unsigned restored = _mm_getcsr();
      _mm_setcsr(saved);
      CHECK((restored & ~kFlags) == kCallersModes);
      std::size_t wrong = 0;
      for (std::size_t j = 0; j < n; ++j) {
        wrong += loadElement(type, out.data() + j * elementSize(type)) != expected[j];
      }
      CAPTURE(kernels->name);
      CHECK(wrong == 0);
    }
  }
}
#endif

}  // namespace
}  // namespace mscclpp_ep::cpu
