// SPDX-License-Identifier: MIT
#include "core/routing.hpp"

#include <span>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

template <typename Index>
void checkIdsOf(const TensorView& topkIdx, std::int64_t numExperts) {
  const std::span ids(static_cast<const Index*>(topkIdx.data),
                      static_cast<std::size_t>(numElements(topkIdx)));
  bool sound = true;
  for (const Index id : ids) sound &= id >= -1 && id < numExperts;
  if (sound) return;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= -1 && ids[i] < numExperts) continue;
    throwBadId(static_cast<std::int64_t>(i), topkIdx.shape[1], ids[i], numExperts);
  }
}

template <typename Index>
std::vector<std::int64_t> countChoices(const TensorView& topkIdx, const SendPlan& plan,
                                       const ExpertPlacement& placement) {
  const auto* ids = static_cast<const Index*>(topkIdx.data);
  const auto ranks = static_cast<std::int64_t>(plan.numRows.size());
  std::vector<std::int64_t> counts(static_cast<std::size_t>(placement.numExperts()));
  for (std::int64_t token = 0; token < topkIdx.shape[0]; ++token) {
    for (std::int64_t k = 0; k < topkIdx.shape[1]; ++k) {
      const Index expert = ids[token * topkIdx.shape[1] + k];
      if (expert < 0) continue;
      const bool sent = plan.head[static_cast<std::size_t>(token * ranks) +
                                  static_cast<std::size_t>(placement.owner(expert))] >= 0;
      counts[static_cast<std::size_t>(expert)] += sent ? 1 : 0;
    }
  }
  return counts;
}

std::vector<std::int32_t> copyOf(const TensorView& tensor) {
  const auto* values = static_cast<const std::int32_t*>(tensor.data);
  return {values, values + tensor.shape[0]};
}

}  // namespace

void throwBadId(std::int64_t place, std::int64_t topk, std::int64_t id, std::int64_t numExperts) {
  throw InvalidArgument(cat("topk_idx[", place / topk, ", ", place % topk, "] is ", id, "; with ",
                            numExperts, " experts an id is 0 to ", numExperts - 1,
                            ", or -1 for none"));
}

void checkIds(const TensorView& topkIdx, std::int64_t numExperts) {
  topkIdx.dtype == DataType::int32 ? checkIdsOf<std::int32_t>(topkIdx, numExperts)
                                   : checkIdsOf<std::int64_t>(topkIdx, numExperts);
}

Routing readRouting(const DispatchInputs& inputs, const ExpertPlacement& placement) {
  Routing routing;
  const std::span inRank(static_cast<const std::uint8_t*>(inputs.isTokenInRank.data),
                         static_cast<std::size_t>(numElements(inputs.isTokenInRank)));
  const auto plan = std::make_shared<SendPlan>(planSend(
      inRank, inputs.isTokenInRank.shape[0], static_cast<int>(inputs.isTokenInRank.shape[1])));
  routing.plan = plan;
  routing.perRank = copyOf(inputs.numTokensPerRank);
  routing.perExpert = copyOf(inputs.numTokensPerExpert);
  if (!inputs.topkIdx) return routing;
  checkIds(inputs.topkIdx, placement.numExperts());
  routing.choices = inputs.topkIdx.dtype == DataType::int32
                        ? countChoices<std::int32_t>(inputs.topkIdx, *plan, placement)
                        : countChoices<std::int64_t>(inputs.topkIdx, *plan, placement);
  return routing;
}

void checkCounts(const Routing& routing) {
  for (std::size_t r = 0; r < routing.perRank.size(); ++r) {
    EP_EXPECTS(routing.perRank[r] == routing.plan->numRows[r], "num_tokens_per_rank[", r, "] is ",
               routing.perRank[r], ", but is_token_in_rank sends ", routing.plan->numRows[r],
               " tokens to rank ", r);
  }
  for (std::size_t e = 0; e < routing.perExpert.size(); ++e) {
    EP_EXPECTS(routing.perExpert[e] >= 0, "num_tokens_per_expert[", e, "] is ",
               routing.perExpert[e], "; it must not be negative");
  }
  for (std::size_t e = 0; e < routing.choices.size(); ++e) {
    EP_EXPECTS(routing.perExpert[e] == routing.choices[e], "num_tokens_per_expert[", e, "] is ",
               routing.perExpert[e], ", but topk_idx and is_token_in_rank send ",
               routing.choices[e], " choices to expert ", e);
  }
}

}  // namespace mscclpp_ep
