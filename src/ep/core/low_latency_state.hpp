// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CORE_LOW_LATENCY_STATE_HPP_
#define MSCCLPP_EP_CORE_LOW_LATENCY_STATE_HPP_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/layout.hpp"

namespace mscclpp_ep {

/// Where the rows of one source rank's tokens are among those received.
struct SourceRows {
  std::int64_t numTokens = 0;
  /// [T, K]: the row of a choice's expert, counted through all experts (expert * R * M + place);
  /// -1: the expert is not held here, or there is none.
  std::vector<std::int32_t> slots;
  std::vector<float> weights;  ///< [T, K]; empty if dispatch was not given them
};

/// What a LowLatencyHandle refers to. Complete once the dispatch is received.
struct LowLatencyState {
  std::uint64_t bufferId = 0;
  std::uint64_t epoch = 0;
  bool complete = false;
  std::int64_t maxTokens = 0;
  std::int64_t hidden = 0;
  std::int64_t topk = 0;
  std::int64_t numTokens = 0;  ///< T of this rank
  bool opaqueRows = false;
  bool hasWeights = false;        ///< every rank sent its weights along
  std::vector<float> ownWeights;  ///< [T, K] of this rank; empty without
  std::shared_ptr<const ExpertPlacement> placement;
  std::vector<std::int32_t> topkIdx;  ///< [T, K] of this rank, global ids
  std::vector<SourceRows> sources;    ///< [R]
};

/// Places the choices of `topkIdx` ([T, K] int32 of one source rank) that are `rank`'s: returns the
/// slots with places counted from 0 in each expert, and adds to `counts` ([L]) the rows of each. A
/// token has one row per expert, also if it chose that twice.
std::vector<std::int32_t> placeChoices(const std::int32_t* topkIdx, std::int64_t numTokens,
                                       std::int64_t topk, const ExpertPlacement& placement,
                                       int rank, std::int64_t slotsPerExpert,
                                       std::vector<std::int32_t>& counts);

/// The choices of `topkIdx` that are `rank`'s; -1 in place of the others.
std::vector<std::int32_t> choicesOf(std::span<const std::int32_t> topkIdx,
                                    const ExpertPlacement& placement, int rank);

/// Ordinals of what a rank sends back for the tokens of one source, by choice: one row a token that
/// has any choice there, or with `perExpert` one for each of its experts there. `choices` ([T, K])
/// has a number for each expert that is the rank's, such as its slot, and -1 for the others; so
/// have the ordinals.
std::vector<std::int32_t> returnOrdinals(std::span<const std::int32_t> choices, std::int64_t topk,
                                         bool perExpert);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_LOW_LATENCY_STATE_HPP_
