// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "core/checksum.hpp"
#include "core/packets.hpp"

namespace mscclpp_ep {
namespace {

// Less than a block, whole blocks, and tails.
constexpr std::size_t kSizes[] = {1, 2, 7, 8, 9, 63, 64, 65, 128, 200, 1024, 1031};

std::vector<std::byte> randomRow(std::size_t bytes) {
  std::mt19937 random(static_cast<unsigned>(bytes));
  std::vector<std::byte> row(bytes);
  for (std::byte& byte : row) byte = static_cast<std::byte>(random() >> 7);
  return row;
}

std::uint64_t of(const std::vector<std::byte>& row) { return checksum(row.data(), row.size()); }

TEST_CASE("every single bit that flips is seen") {
  for (const std::size_t bytes : kSizes) {
    CAPTURE(bytes);
    for (std::vector<std::byte> row : {randomRow(bytes), std::vector<std::byte>(bytes)}) {
      const std::uint64_t before = of(row);
      std::size_t unseen = 0;
      for (std::size_t bit = 0; bit < 8 * bytes; ++bit) {
        row[bit / 8] ^= std::byte{1} << (bit % 8);
        unseen += of(row) == before ? 1 : 0;
        row[bit / 8] ^= std::byte{1} << (bit % 8);
      }
      CHECK(unseen == 0);
    }
  }
}

TEST_CASE("words that change places are seen, also if they differ in one bit") {
  for (const std::size_t word : {2, 4, 8, 64}) {
    CAPTURE(word);
    std::vector<std::byte> row(1024);
    std::size_t unseen = 0;
    for (std::size_t i = 1; i < row.size() / word; ++i) {
      row[word - 1] = std::byte{0x80};
      const std::uint64_t before = of(row);
      std::swap_ranges(row.begin(), row.begin() + static_cast<std::ptrdiff_t>(word),
                       row.begin() + static_cast<std::ptrdiff_t>(i * word));
      unseen += of(row) == before ? 1 : 0;
      std::fill(row.begin(), row.end(), std::byte{0});
    }
    CHECK(unseen == 0);
  }
}

TEST_CASE("rows and parts that change places, and other lengths, are seen") {
  const auto a = randomRow(96);
  const auto b = randomRow(97);
  CHECK(of(a) != of(b));
  CHECK(checksum(a.data(), 96, of(b)) != checksum(b.data(), 97, of(a)));
  CHECK(extendChecksum(extendChecksum(0, 1), 2) != extendChecksum(extendChecksum(0, 2), 1));
  // Zeros at the end, and none at all.
  const std::vector<std::byte> zeros(300);
  std::set<std::uint64_t> sums;
  for (std::size_t bytes = 0; bytes <= zeros.size(); ++bytes) {
    sums.insert(checksum(zeros.data(), bytes));
  }
  CHECK(sums.size() == zeros.size() + 1);
}

TEST_CASE("a checksum depends on nothing but the bytes") {
  const auto row = randomRow(1031);
  for (std::size_t skip = 0; skip < 16; ++skip) {
    std::vector<std::byte> moved(skip);
    moved.insert(moved.end(), row.begin(), row.end());
    CHECK(checksum(moved.data() + skip, row.size()) == of(row));
  }
}

TEST_CASE("a tag keeps what it is made of") {
  const std::uint64_t tag = packTag(513, 0x7FFF'FFFE, 0x1'0000'0005);
  CHECK(tagRank(tag) == 513);
  CHECK(tagToken(tag) == 0x7FFF'FFFE);
  CHECK(tagEpoch(tag) == 5);
  CHECK(packTag(0, 0, 1) != packTag(0, 1, 0));
}

}  // namespace
}  // namespace mscclpp_ep
