// SPDX-License-Identifier: MIT
#include "core/layout.hpp"

#include <algorithm>

#include "mscclpp_ep/sizes.hpp"

namespace mscclpp_ep {

ExpertPlacement::ExpertPlacement(std::int64_t numExperts, int numRanks,
                                 std::span<const std::int32_t> expertMap)
    : owner_(static_cast<std::size_t>(numExperts)),
      localIndex_(static_cast<std::size_t>(numExperts)),
      numLocal_(static_cast<std::size_t>(numRanks)) {
  const std::int64_t perRank = (numExperts + numRanks - 1) / numRanks;
  for (std::size_t expert = 0; expert < owner_.size(); ++expert) {
    owner_[expert] = expertMap.empty()
                         ? static_cast<std::int32_t>(static_cast<std::int64_t>(expert) / perRank)
                         : expertMap[expert];
    localIndex_[expert] =
        static_cast<std::int32_t>(numLocal_[static_cast<std::size_t>(owner_[expert])]++);
  }
}

std::vector<std::int32_t> ExpertPlacement::localPart(
    int rank, std::span<const std::int32_t> perExpert) const {
  std::vector<std::int32_t> part;
  part.reserve(static_cast<std::size_t>(numLocal(rank)));
  for (std::size_t expert = 0; expert < owner_.size(); ++expert) {
    if (owner_[expert] == rank) part.push_back(perExpert[expert]);
  }
  return part;
}

SendPlan planSend(std::span<const std::uint8_t> isTokenInRank, std::int64_t numTokens,
                  int numRanks) {
  const auto ranks = static_cast<std::size_t>(numRanks);
  SendPlan plan{std::vector<std::int32_t>(static_cast<std::size_t>(numTokens) * ranks),
                std::vector<std::int64_t>(ranks)};
  for (std::size_t row = 0; row < plan.head.size(); row += ranks) {
    for (std::size_t r = 0; r < ranks; ++r) {
      const bool sent = isTokenInRank[row + r] != 0;
      plan.head[row + r] = sent ? static_cast<std::int32_t>(plan.numRows[r]++) : -1;
    }
  }
  return plan;
}

std::vector<std::int64_t> exclusivePrefixSum(std::span<const std::int64_t> values) {
  std::vector<std::int64_t> first(values.size());
  for (std::size_t i = 1; i < values.size(); ++i) first[i] = first[i - 1] + values[i - 1];
  return first;
}

template <typename Index>
void TokenCounts<Index>::add(std::span<const Index> choices, std::span<std::uint8_t> inRank) const {
  std::fill(inRank.begin(), inRank.end(), std::uint8_t{0});
  for (const Index expert : choices) {
    if (expert < 0) continue;
    ++perExpert[static_cast<std::size_t>(expert)];
    const auto owner = static_cast<std::size_t>(placement.owner(expert));
    perRank[owner] += inRank[owner] == 0;
    inRank[owner] = 1;
  }
}

template struct TokenCounts<std::int32_t>;
template struct TokenCounts<std::int64_t>;

}  // namespace mscclpp_ep
