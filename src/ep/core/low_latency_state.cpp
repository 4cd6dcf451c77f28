// SPDX-License-Identifier: MIT
#include "core/low_latency_state.hpp"

#include "core/backend.hpp"
#include "core/check.hpp"
#include "mscclpp_ep/low_latency.hpp"

namespace mscclpp_ep {

namespace {

/// The first choice of the token that is the same as choice `k`.
std::int64_t firstOfSame(const std::int32_t* choices, std::int64_t k) {
  for (std::int64_t earlier = 0; earlier < k; ++earlier) {
    if (choices[earlier] == choices[k]) return earlier;
  }
  return k;
}

}  // namespace

std::vector<std::int32_t> placeChoices(const std::int32_t* topkIdx, std::int64_t numTokens,
                                       std::int64_t topk, const ExpertPlacement& placement,
                                       int rank, std::int64_t slotsPerExpert,
                                       std::vector<std::int32_t>& counts) {
  std::vector<std::int32_t> slots(static_cast<std::size_t>(numTokens * topk), -1);
  for (std::int64_t token = 0; token < numTokens; ++token) {
    const std::int32_t* choices = topkIdx + token * topk;
    std::int32_t* own = slots.data() + token * topk;
    for (std::int64_t k = 0; k < topk; ++k) {
      if (choices[k] < 0 || placement.owner(choices[k]) != rank) continue;
      const std::int64_t first = firstOfSame(choices, k);
      if (first < k) {
        own[k] = own[first];
        continue;
      }
      const std::int32_t local = placement.localIndex(choices[k]);
      std::int32_t& count = counts[static_cast<std::size_t>(local)];
      own[k] = static_cast<std::int32_t>(local * slotsPerExpert + count++);
    }
  }
  return slots;
}

std::vector<std::int32_t> choicesOf(std::span<const std::int32_t> topkIdx,
                                    const ExpertPlacement& placement, int rank) {
  std::vector<std::int32_t> choices(topkIdx.begin(), topkIdx.end());
  for (std::int32_t& id : choices) {
    if (id >= 0 && placement.owner(id) != rank) id = -1;
  }
  return choices;
}

std::vector<std::int32_t> returnOrdinals(std::span<const std::int32_t> choices, std::int64_t topk,
                                         bool perExpert) {
  std::vector<std::int32_t> ordinals(choices.size(), -1);
  std::int32_t next = 0;
  for (std::size_t token = 0; token < choices.size(); token += static_cast<std::size_t>(topk)) {
    const std::int32_t* of = choices.data() + token;
    std::int32_t* own = ordinals.data() + token;
    std::int32_t ofToken = -1;
    for (std::int64_t k = 0; k < topk; ++k) {
      if (of[k] < 0) continue;
      if (!perExpert) {
        if (ofToken < 0) ofToken = next++;
        own[k] = ofToken;
        continue;
      }
      const std::int64_t first = firstOfSame(of, k);
      own[k] = first < k ? own[first] : next++;
    }
  }
  return ordinals;
}

std::uint64_t LowLatencyHandle::epoch() const {
  EP_EXPECTS(state_ != nullptr, "the handle is empty");
  return state_->epoch;
}

PendingReceive::PendingReceive(std::shared_ptr<ReceiveState> state) : state_(std::move(state)) {}

LowLatencyHandle PendingReceive::handle() const { return LowLatencyHandle(state_->handle); }

}  // namespace mscclpp_ep
