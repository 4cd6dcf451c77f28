// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "core/memory_map.hpp"

namespace mscclpp_ep {
namespace {

struct Region {
  std::string name;
  std::size_t begin = 0;
  std::size_t bytes = 0;
};

constexpr Lane kLanes[] = {Lane::highThroughput, Lane::lowLatency0, Lane::lowLatency1};

void addLane(const ControlMap& map, Lane lane, int peer, std::vector<Region>& regions) {
  const std::string at = cat(" of rank ", peer, " in lane ", static_cast<int>(lane));
  for (std::uint64_t i = 0; i < kMailboxDepth; ++i) {
    regions.push_back({cat("slot ", i, at), map.slot(lane, peer, i), kSlotBytes});
  }
  regions.push_back({"consumed" + at, map.consumed(lane, peer), kCacheLine});
  for (int which = 0; which < kNumProgress; ++which) {
    regions.push_back({cat("progress ", which, at),
                       map.progress(lane, static_cast<Progress>(which), peer), kCacheLine});
  }
}

/// Everything in a control segment; words count as the cache line that they have to themselves.
std::vector<Region> regionsOf(int numRanks) {
  const ControlMap map(numRanks);
  std::vector<Region> regions{{"doorbell", ControlMap::doorbell(), kCacheLine},
                              {"waiting", ControlMap::waiting(), kCacheLine},
                              {"closed", ControlMap::closed(), kCacheLine}};
  for (int peer = 0; peer < numRanks; ++peer) {
    regions.push_back({cat("abort ", peer), map.abortWord(peer), kCacheLine});
    regions.push_back({cat("goodbye ", peer), map.goodbye(peer), kCacheLine});
    regions.push_back({cat("mask ", peer), map.mask(peer), kCacheLine});
    regions.push_back({cat("counts ", peer), map.counts(peer), kCountWords * 8});
    for (const Lane lane : kLanes) addLane(map, lane, peer, regions);
  }
  return regions;
}

TEST_CASE("no two regions of a control segment overlap") {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    const std::vector<Region> regions = regionsOf(ranks);
    const std::size_t total = ControlMap(ranks).bytes();
    CHECK(controlBytes(ranks) == static_cast<std::int64_t>(total));
    for (const Region& region : regions) {
      INFO(region.name << " of " << ranks << " ranks");
      CHECK(region.begin + region.bytes <= total);
      CHECK(region.begin % kCacheLine == 0);
    }
    for (std::size_t i = 0; i < regions.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        const Region& a = regions[i];
        const Region& b = regions[j];
        const bool apart = a.begin + a.bytes <= b.begin || b.begin + b.bytes <= a.begin;
        if (!apart) FAIL(ranks << " ranks: " << a.name << " overlaps " << b.name);
      }
    }
  }
}

TEST_CASE("slots are used in turn, also where the sequence wraps") {
  const ControlMap map(3);
  for (const std::uint64_t start :
       {std::uint64_t{0}, (std::uint64_t{1} << 32) - 2, ~std::uint64_t{1}}) {
    for (std::uint64_t i = 0; i < 3 * kMailboxDepth; ++i) {
      const std::size_t here = map.slot(Lane::highThroughput, 1, start + i);
      CHECK(here == map.slot(Lane::highThroughput, 1, start + i + kMailboxDepth));
      for (std::uint64_t other = 1; other < kMailboxDepth; ++other) {
        CHECK(here != map.slot(Lane::highThroughput, 1, start + i + other));
      }
    }
  }
}

TEST_CASE("a header leaves the rest of its slot to the message") {
  CHECK(offsetof(SlotHeader, flag) == 0);
  CHECK(sizeof(SlotHeader) + kSlotPayload == kSlotBytes);
}

TEST_CASE("the size of a block is monotone, and little of it is wasted") {
  std::vector<std::size_t> sizes;
  for (std::size_t wanted = 0; wanted <= 40 * kPage; wanted += 7) sizes.push_back(wanted);
  for (int bit = 12; bit <= 44; ++bit) {
    for (const std::size_t off : {0, 1}) {
      sizes.push_back((std::size_t{1} << bit) + off);
      sizes.push_back((std::size_t{1} << bit) - 1);
      sizes.push_back((std::size_t{5} << (bit - 2)) + off);
    }
  }
  std::ranges::sort(sizes);
  std::size_t last = kPage;
  for (const std::size_t wanted : sizes) {
    CAPTURE(wanted);
    const std::size_t bytes = blockBytes(wanted);
    CHECK(bytes >= wanted);
    CHECK(bytes >= last);
    CHECK(bytes % kPage == 0);
    // At most a quarter more, or less than a page.
    CHECK(bytes - wanted <= std::max(wanted / 4, kPage));
    CHECK(blockBytes(bytes) == bytes);
    last = bytes;
  }
}

TEST_CASE("blocks come in four sizes an octave") {
  std::vector<std::size_t> found;
  for (std::size_t wanted = 64 * kPage + 1; wanted <= 128 * kPage; ++wanted) {
    const std::size_t bytes = blockBytes(wanted);
    if (found.empty() || found.back() != bytes) found.push_back(bytes);
  }
  CHECK(found == std::vector<std::size_t>{80 * kPage, 96 * kPage, 112 * kPage, 128 * kPage});
}

TEST_CASE("the columns of a landing block do not overlap and hold their rows") {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    CAPTURE(round);
    const auto draw = [&random](std::int64_t most) {
      return std::uniform_int_distribution<std::int64_t>(0, most)(random);
    };
    const std::int64_t rows = draw(3000);
    std::int64_t rowBytes[kNumColumns] = {};
    for (std::int64_t& bytes : rowBytes) bytes = draw(1) * draw(9000);
    const LandingMap map = landingMap(rows, rowBytes);
    std::uint64_t end = 0;
    for (int column = 0; column < kNumColumns; ++column) {
      CHECK(map.offset[column] % kCacheLine == 0);
      CHECK(map.offset[column] >= end);
      end = map.offset[column] + static_cast<std::uint64_t>(rows * rowBytes[column]);
    }
    CHECK(map.bytes >= end);
    CHECK(map.bytes < end + (kNumColumns + 1) * kPage);
  }
}

}  // namespace
}  // namespace mscclpp_ep
