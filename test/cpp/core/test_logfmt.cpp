// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "core/logfmt.hpp"

namespace mscclpp_ep {
namespace {

using Row = std::vector<std::uint16_t>;

double valueOf(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t bitsOf(double value) {
  const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
  return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

/// Magnitudes between 2^low and 2^high, of both signs.
Row randomRow(std::mt19937& random, std::size_t hidden, double low, double high) {
  std::uniform_real_distribution<double> exponent(low, high);
  Row row(hidden);
  for (std::uint16_t& element : row) {
    element = bitsOf(std::exp2(exponent(random)) * ((random() & 1u) != 0 ? -1 : 1));
  }
  return row;
}

struct Coded {
  Row row;
  std::size_t bytes;
};

Coded roundTrip(const Row& row) {
  constexpr auto kGuard = static_cast<std::byte>(0xA5);
  std::vector<std::byte> bytes(logfmtRowBytes(row.size()) + 64, kGuard);
  Coded coded{Row(row.size(), 0xDEAD), encodeLogfmt(row, bytes.data())};
  CHECK(coded.bytes <= logfmtRowBytes(row.size()));
  CHECK(std::all_of(bytes.end() - 64, bytes.end(), [=](std::byte b) { return b == kGuard; }));
  decodeLogfmt(bytes.data(), coded.row);
  return coded;
}

/// The ratio of neighbouring codes of the group of 128 that holds element `at`.
double stepOf(const Row& row, std::size_t at) {
  const auto begin = row.begin() + static_cast<std::ptrdiff_t>(at / 128 * 128);
  const auto end =
      row.begin() + static_cast<std::ptrdiff_t>(std::min(row.size(), at / 128 * 128 + 128));
  double most = 0;
  double least = INFINITY;
  for (auto element = begin; element != end; ++element) {
    most = std::max(most, std::fabs(valueOf(*element)));
    least = std::min(least, std::fabs(valueOf(*element)));
  }
  const double octaves = std::min(std::log2(most) - std::log2(least), 32.0);
  return std::exp2(octaves / 510);
}

TEST_CASE("values come back within half a code and the rounding to bfloat16") {
  std::mt19937 random(99);
  for (const std::size_t hidden : {1u, 16u, 100u, 128u, 130u, 512u, 1000u, 1024u, 7168u}) {
    for (const double low : {-1.0, -8.0, -31.0}) {
      const Row row = randomRow(random, hidden, low, -0.01);
      const Coded coded = roundTrip(row);
      double worst = 0;
      for (std::size_t i = 0; i < hidden; ++i) {
        const double ratio = valueOf(coded.row[i]) / valueOf(row[i]);
        REQUIRE(ratio > 0);
        const double allowed = (stepOf(row, i) - 1) / 2 * 1.02 + 1.0 / 256;
        worst = std::max(worst, std::fabs(ratio - 1) / (allowed + 1e-3));
      }
      CAPTURE(hidden);
      CAPTURE(low);
      CHECK(worst <= 1);
    }
  }
}

TEST_CASE("an encoded row takes ten bits an element, and the magnitudes of its groups") {
  std::mt19937 random(7);
  for (const std::size_t hidden : {512u, 1024u, 7168u, 2560u}) {
    const Coded coded = roundTrip(randomRow(random, hidden, -9, -1));
    CHECK(coded.bytes == hidden * 10 / 8 + hidden / 128 * 4);
  }
}

TEST_CASE("chunks that cannot be encoded are left as they are") {
  std::mt19937 random(8);
  for (const std::uint16_t odd : {std::uint16_t{0x3F80}, std::uint16_t{0xC100},
                                  std::uint16_t{0x7F80}, std::uint16_t{0x7FC0}}) {
    Row row = randomRow(random, 2048, -6, -1);
    row[1500] = odd;  // 1, -8, infinity, NaN: in the second chunk
    const Coded coded = roundTrip(row);
    CHECK(coded.bytes == 16 * 4 + 1024 * 10 / 8 + 1024 * 2);
    CHECK(std::equal(row.begin() + 1024, row.end(), coded.row.begin() + 1024));
  }
  const Row same(512, bitsOf(0.25));
  CHECK(roundTrip(same).row == same);
  const Row zeros(512, 0);
  CHECK(roundTrip(zeros).row == zeros);
}

TEST_CASE("zeros and signs survive beside other values") {
  std::mt19937 random(9);
  Row row = randomRow(random, 512, -5, -1);
  for (std::size_t i = 0; i < row.size(); i += 7) row[i] = 0;
  const Coded coded = roundTrip(row);
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (i % 7 == 0) CHECK(coded.row[i] == 0);
    if (i % 7 != 0) CHECK((coded.row[i] >> 15) == (row[i] >> 15));
  }
}

TEST_CASE("any bytes can be decoded, and nothing is written beyond the row") {
  std::mt19937 random(10);
  for (int turn = 0; turn < 2000; ++turn) {
    const std::size_t hidden = 1 + random() % 1500;
    Row row(hidden + 16, 0xDEAD);
    std::vector<std::byte> bytes(logfmtRowBytes(hidden));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
    decodeLogfmt(bytes.data(), std::span(row).first(hidden));
    CHECK(std::all_of(row.end() - 16, row.end(), [](std::uint16_t e) { return e == 0xDEAD; }));
  }
}

}  // namespace
}  // namespace mscclpp_ep
