// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "core/layout.hpp"
#include "mscclpp_ep/sizes.hpp"

namespace mscclpp_ep {
namespace {

using Random = std::mt19937;

int draw(Random& random, int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(random);
}

/// Each expert has one place, and the places of a rank are 0 to numLocal - 1 in order of expert.
void checkPlaces(const ExpertPlacement& placement, int numRanks) {
  std::vector<std::int64_t> seen(static_cast<std::size_t>(numRanks));
  for (std::int64_t expert = 0; expert < placement.numExperts(); ++expert) {
    const std::int32_t owner = placement.owner(expert);
    REQUIRE(owner >= 0);
    REQUIRE(owner < numRanks);
    CHECK(placement.localIndex(expert) == seen[static_cast<std::size_t>(owner)]++);
  }
  for (int rank = 0; rank < numRanks; ++rank) {
    CHECK(placement.numLocal(rank) == seen[static_cast<std::size_t>(rank)]);
  }
}

TEST_CASE("experts lie in contiguous blocks of ceil(E / R), the last ones short or empty") {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    for (int experts = 1; experts <= 40; ++experts) {
      CAPTURE(ranks);
      CAPTURE(experts);
      const ExpertPlacement placement(experts, ranks, {});
      CHECK(placement.numExperts() == experts);
      checkPlaces(placement, ranks);
      int rank = 0;
      int inBlock = 0;
      for (int expert = 0; expert < experts; ++expert) {
        if (inBlock * ranks >= experts) {
          ++rank;
          inBlock = 0;
        }
        CHECK(placement.owner(expert) == rank);
        CHECK(placement.localIndex(expert) == inBlock++);
      }
      for (int r = 0; r < ranks; ++r) {
        CHECK(placement.numLocal(r) == numLocalExperts(experts, ranks, r));
      }
    }
  }
}

TEST_CASE("fewer experts than ranks leave ranks without any") {
  const ExpertPlacement placement(3, 8, {});
  for (int rank = 0; rank < 8; ++rank) CHECK(placement.numLocal(rank) == (rank < 3 ? 1 : 0));
  CHECK(placement.localPart(5, std::vector<std::int32_t>{1, 2, 3}).empty());
}

TEST_CASE("a map places experts freely, numbered by global id") {
  const std::vector<std::int32_t> map{2, 0, 2, 2, 0, 3};
  const ExpertPlacement placement(6, 4, map);
  checkPlaces(placement, 4);
  for (std::size_t e = 0; e < map.size(); ++e) {
    CHECK(placement.owner(static_cast<std::int64_t>(e)) == map[e]);
  }
  const std::vector<std::int32_t> perExpert{10, 11, 12, 13, 14, 15};
  CHECK(placement.localPart(0, perExpert) == std::vector<std::int32_t>{11, 14});
  CHECK(placement.localPart(1, perExpert).empty());
  CHECK(placement.localPart(2, perExpert) == std::vector<std::int32_t>{10, 12, 13});
  CHECK(placement.localPart(3, perExpert) == std::vector<std::int32_t>{15});
}

TEST_CASE("random maps") {
  for (unsigned seed = 0; seed < 50; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const int ranks = draw(random, 1, 9);
    std::vector<std::int32_t> map(static_cast<std::size_t>(draw(random, 1, 64)));
    for (std::int32_t& rank : map) rank = draw(random, 0, ranks - 1);
    checkPlaces(ExpertPlacement(static_cast<std::int64_t>(map.size()), ranks, map), ranks);
  }
}

TEST_CASE("a plan counts, for each rank, the tokens before each one") {
  for (unsigned seed = 0; seed < 50; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const auto ranks = static_cast<std::size_t>(draw(random, 1, 9));
    const auto tokens = static_cast<std::size_t>(draw(random, 0, 60));
    std::vector<std::uint8_t> sent(tokens * ranks);
    for (std::uint8_t& flag : sent) flag = static_cast<std::uint8_t>(draw(random, 0, 2));
    const SendPlan plan =
        planSend(sent, static_cast<std::int64_t>(tokens), static_cast<int>(ranks));
    REQUIRE(plan.head.size() == sent.size());
    REQUIRE(plan.numRows.size() == ranks);
    for (std::size_t r = 0; r < ranks; ++r) {
      std::int64_t before = 0;
      for (std::size_t token = 0; token < tokens; ++token) {
        const bool goes = sent[token * ranks + r] != 0;
        CHECK(plan.head[token * ranks + r] == (goes ? before : -1));
        before += goes ? 1 : 0;
      }
      CHECK(plan.numRows[r] == before);
    }
  }
}

TEST_CASE("prefix sums are exclusive and hold more than 32 bits") {
  CHECK(exclusivePrefixSum({}).empty());
  const std::vector<std::int64_t> values{3, 0, std::int64_t{1} << 40, 5};
  CHECK(exclusivePrefixSum(values) ==
        std::vector<std::int64_t>{0, 3, 3, (std::int64_t{1} << 40) + 3});
}

TEST_CASE("rows at or beyond the capacity are dropped") {
  for (std::int64_t first = 0; first <= 12; ++first) {
    for (std::int64_t count = 0; count <= 12; ++count) {
      for (std::int64_t capacity = 0; capacity <= 12; ++capacity) {
        std::int64_t kept = 0;
        for (std::int64_t row = first; row < first + count; ++row) kept += row < capacity ? 1 : 0;
        CHECK(rowsKept(first, count, capacity) == kept);
      }
    }
  }
}

TEST_CASE("counts are rounded up to multiples") {
  for (std::int64_t alignment = 1; alignment <= 9; ++alignment) {
    for (std::int64_t value = 0; value <= 40; ++value) {
      std::int64_t expected = 0;
      while (expected < value) expected += alignment;
      CHECK(roundUp(value, alignment) == expected);
    }
  }
}

struct Counted {
  std::vector<std::int32_t> perRank;
  std::vector<std::int32_t> perExpert;
  std::vector<std::vector<std::uint8_t>> inRank;
};

/// Every choice counts for its expert; a token counts once for each rank that it goes to.
Counted countByHand(const std::vector<std::vector<int>>& choices, const ExpertPlacement& placement,
                    int ranks) {
  Counted counted;
  counted.perRank.resize(static_cast<std::size_t>(ranks));
  counted.perExpert.resize(static_cast<std::size_t>(placement.numExperts()));
  for (const std::vector<int>& token : choices) {
    std::set<std::int32_t> owners;
    for (const int expert : token) {
      if (expert < 0) continue;
      ++counted.perExpert[static_cast<std::size_t>(expert)];
      owners.insert(placement.owner(expert));
    }
    std::vector<std::uint8_t> row(static_cast<std::size_t>(ranks));
    for (const std::int32_t owner : owners) {
      ++counted.perRank[static_cast<std::size_t>(owner)];
      row[static_cast<std::size_t>(owner)] = 1;
    }
    counted.inRank.push_back(row);
  }
  return counted;
}

TEST_CASE_TEMPLATE("tokens are counted once a rank and once a choice", Index, std::int32_t,
                   std::int64_t) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    CAPTURE(seed);
    Random random(seed);
    const int ranks = draw(random, 1, 9);
    const int experts = draw(random, 1, 24);
    const int topk = draw(random, 1, 10);
    const ExpertPlacement placement(experts, ranks, {});
    std::vector<std::vector<int>> choices(static_cast<std::size_t>(draw(random, 0, 40)));
    for (auto& token : choices) {
      for (int k = 0; k < topk; ++k) token.push_back(draw(random, -1, experts - 1));
    }
    const Counted expected = countByHand(choices, placement, ranks);

    Counted found;
    found.perRank.resize(expected.perRank.size());
    found.perExpert.resize(expected.perExpert.size());
    const TokenCounts<Index> counts{placement, found.perRank, found.perExpert};
    for (const auto& token : choices) {
      const std::vector<Index> ids(token.begin(), token.end());
      std::vector<std::uint8_t> inRank(static_cast<std::size_t>(ranks), 0xAB);
      counts.add(ids, inRank);
      found.inRank.push_back(inRank);
    }
    CHECK(found.perRank == expected.perRank);
    CHECK(found.perExpert == expected.perExpert);
    CHECK(found.inRank == expected.inRank);
  }
}

}  // namespace
}  // namespace mscclpp_ep
