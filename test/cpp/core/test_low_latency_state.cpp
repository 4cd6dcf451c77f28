// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "core/low_latency_state.hpp"

namespace mscclpp_ep {
namespace {

using Random = std::mt19937;

int draw(Random& random, int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(random);
}

/// Choices of some tokens among some experts, of which each belongs to a rank.
struct Routing {
  explicit Routing(Random& random)
      : ranks(draw(random, 1, 6)),
        experts(draw(random, 1, 20)),
        topk(draw(random, 1, 12)),
        tokens(draw(random, 0, 25)) {
    for (int i = 0; i < experts && draw(random, 0, 3) != 0; ++i) map.push_back(0);
    map.resize(map.size() == static_cast<std::size_t>(experts) ? map.size() : 0);
    for (std::int32_t& owner : map) owner = draw(random, 0, ranks - 1);
    for (int i = 0; i < tokens * topk; ++i) ids.push_back(draw(random, -1, experts - 1));
  }

  std::int32_t id(int token, int k) const {
    return ids[static_cast<std::size_t>(token * topk + k)];
  }

  int ranks, experts, topk, tokens;
  std::vector<std::int32_t> map;
  std::vector<std::int32_t> ids;
};

TEST_CASE("choices are placed by expert and token, an expert once a token") {
  Random random(20);
  for (int round = 0; round < 400; ++round) {
    const Routing routing(random);
    const ExpertPlacement placement(routing.experts, routing.ranks, routing.map);
    const int rank = draw(random, 0, routing.ranks - 1);
    const std::int64_t slotsPerExpert = 1000 + draw(random, 0, 50);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(placement.numLocal(rank)));
    for (std::int32_t& count : counts) count = draw(random, 0, 9);
    const std::vector<std::int32_t> before = counts;
    const auto slots = placeChoices(routing.ids.data(), routing.tokens, routing.topk, placement,
                                    rank, slotsPerExpert, counts);

    // Each expert of the rank takes the tokens that chose it, in their order.
    std::map<std::pair<std::int32_t, int>, std::int64_t> expected;
    std::vector<std::int32_t> after = before;
    for (std::int32_t expert = 0; expert < routing.experts; ++expert) {
      if (placement.owner(expert) != rank) continue;
      const auto local = static_cast<std::size_t>(placement.localIndex(expert));
      for (int token = 0; token < routing.tokens; ++token) {
        const auto first = routing.ids.begin() + token * routing.topk;
        if (std::count(first, first + routing.topk, expert) == 0) continue;
        expected[{expert, token}] =
            static_cast<std::int64_t>(local) * slotsPerExpert + after[local]++;
      }
    }
    CHECK(counts == after);
    REQUIRE(slots.size() == routing.ids.size());
    for (int token = 0; token < routing.tokens; ++token) {
      for (int k = 0; k < routing.topk; ++k) {
        const auto found = expected.find({routing.id(token, k), token});
        const std::int64_t slot = found == expected.end() ? -1 : found->second;
        CHECK(slots[static_cast<std::size_t>(token * routing.topk + k)] == slot);
      }
    }
  }
}

TEST_CASE("the choices of a rank are its experts', the others none") {
  Random random(21);
  for (int round = 0; round < 200; ++round) {
    const Routing routing(random);
    const ExpertPlacement placement(routing.experts, routing.ranks, routing.map);
    for (int rank = 0; rank < routing.ranks; ++rank) {
      const auto own = choicesOf(routing.ids, placement, rank);
      REQUIRE(own.size() == routing.ids.size());
      for (std::size_t i = 0; i < own.size(); ++i) {
        const bool mine = routing.ids[i] >= 0 && placement.owner(routing.ids[i]) == rank;
        CHECK(own[i] == (mine ? routing.ids[i] : -1));
      }
    }
  }
}

TEST_CASE("returned rows are counted by token, or by token and expert") {
  Random random(22);
  for (int round = 0; round < 400; ++round) {
    const Routing routing(random);
    const auto perToken = returnOrdinals(routing.ids, routing.topk, false);
    const auto perExpert = returnOrdinals(routing.ids, routing.topk, true);
    std::int32_t tokens = 0;
    std::int32_t rows = 0;
    for (int token = 0; token < routing.tokens; ++token) {
      std::map<std::int32_t, std::int32_t> seen;
      for (int k = 0; k < routing.topk; ++k) {
        const auto at = static_cast<std::size_t>(token * routing.topk + k);
        const std::int32_t id = routing.ids[at];
        if (id >= 0 && seen.emplace(id, rows).second) ++rows;
        CHECK(perExpert[at] == (id < 0 ? -1 : seen[id]));
        CHECK(perToken[at] == (id < 0 ? -1 : tokens));
      }
      if (!seen.empty()) ++tokens;
    }
  }
}

TEST_CASE("sender and receiver count returned rows alike") {
  Random random(23);
  for (int round = 0; round < 300; ++round) {
    const Routing routing(random);
    const ExpertPlacement placement(routing.experts, routing.ranks, routing.map);
    const int rank = draw(random, 0, routing.ranks - 1);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(placement.numLocal(rank)));
    const auto slots = placeChoices(routing.ids.data(), routing.tokens, routing.topk, placement,
                                    rank, routing.tokens + 1, counts);
    const auto choices = choicesOf(routing.ids, placement, rank);
    for (const bool perExpert : {false, true}) {
      CHECK(returnOrdinals(slots, routing.topk, perExpert) ==
            returnOrdinals(choices, routing.topk, perExpert));
    }
  }
}

}  // namespace
}  // namespace mscclpp_ep
