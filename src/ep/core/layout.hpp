// SPDX-License-Identifier: MIT
// Who gets which row: the arithmetic of routing, as pure functions.
#ifndef MSCCLPP_EP_CORE_LAYOUT_HPP_
#define MSCCLPP_EP_CORE_LAYOUT_HPP_

#include <cstdint>
#include <span>
#include <vector>

namespace mscclpp_ep {

/// Which rank holds each expert, and as which of its own.
class ExpertPlacement {
 public:
  /// Contiguous blocks of ceil(E / R), or as `expertMap` says if it is not empty (E ranks).
  ExpertPlacement(std::int64_t numExperts, int numRanks, std::span<const std::int32_t> expertMap);

  std::int64_t numExperts() const { return static_cast<std::int64_t>(owner_.size()); }
  std::int64_t numLocal(int rank) const { return numLocal_[static_cast<std::size_t>(rank)]; }
  std::int32_t owner(std::int64_t expert) const { return owner_[static_cast<std::size_t>(expert)]; }
  std::int32_t localIndex(std::int64_t expert) const {
    return localIndex_[static_cast<std::size_t>(expert)];
  }

  /// Picks `rank`'s experts out of a number per expert, in order of local index.
  std::vector<std::int32_t> localPart(int rank, std::span<const std::int32_t> perExpert) const;

 private:
  std::vector<std::int32_t> owner_;
  std::vector<std::int32_t> localIndex_;
  std::vector<std::int64_t> numLocal_;
};

/// Ordinals of tokens among those sent to each rank.
struct SendPlan {
  std::vector<std::int32_t> head;     ///< [T, R]; -1: not sent there
  std::vector<std::int64_t> numRows;  ///< [R] tokens sent to each rank
};
SendPlan planSend(std::span<const std::uint8_t> isTokenInRank, std::int64_t numTokens,
                  int numRanks);

/// first[r] = values[0] + … + values[r - 1].
std::vector<std::int64_t> exclusivePrefixSum(std::span<const std::int64_t> values);

/// How many of `count` rows, of which the first is row `first`, lie below `capacity`.
constexpr std::int64_t rowsKept(std::int64_t first, std::int64_t count, std::int64_t capacity) {
  const std::int64_t room = capacity > first ? capacity - first : 0;
  return count < room ? count : room;
}

/// How many parts of `size` make up `value`, the last one perhaps not whole.
constexpr std::int64_t divideUp(std::int64_t value, std::int64_t size) {
  return (value + size - 1) / size;
}

/// `value` rounded up to a multiple of `alignment`.
constexpr std::int64_t roundUp(std::int64_t value, std::int64_t alignment) {
  return divideUp(value, alignment) * alignment;
}

/// Counts of a dispatch layout; `Index` is int32 or int64. Ids of -1 count for nothing.
template <typename Index>
struct TokenCounts {
  const ExpertPlacement& placement;
  std::span<std::int32_t> perRank;
  std::span<std::int32_t> perExpert;

  /// Counts one token's choices and marks its ranks in `inRank`, which is [R] and is overwritten.
  void add(std::span<const Index> choices, std::span<std::uint8_t> inRank) const;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_LAYOUT_HPP_
