// SPDX-License-Identifier: MIT
#include "host/told_counts.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <iterator>
#include <ranges>
#include <vector>

#include "core/memory_map.hpp"
#include "core/packets.hpp"
#include "transport/wait.hpp"

namespace mscclpp_ep {

namespace {

/// Counts that one rank tells, as they come.
class Incoming {
 public:
  Incoming(std::byte* words, std::size_t count, std::uint64_t epoch)
      : words_(words), counts_(count), tag_(static_cast<std::uint32_t>(epoch)) {}

  bool complete() {
    while (known_ < counts_.size() &&
           take(sharedWord(words_, known_ * sizeof(std::uint64_t)).load())) {
      ++known_;
    }
    return known_ == counts_.size();
  }
  std::int64_t operator[](std::size_t i) const { return counts_[i]; }

 private:
  /// A word never written is 0. A rank that has given up this operation may have begun others, but
  /// no more than there is room for their messages: its counts mean nothing, as its refusal is on
  /// the way.
  bool take(std::uint64_t word) {
    constexpr std::uint32_t kMostAhead = 2 * kMailboxDepth;
    const std::uint32_t ahead = signalTag(word) - tag_;
    if (signalValue(word) == 0 || ahead > kMostAhead) return false;
    counts_[known_] = ahead == 0 ? signalCount(word) : 0;
    return true;
  }

  std::byte* words_;
  std::vector<std::int64_t> counts_;
  std::uint32_t tag_;
  std::size_t known_ = 0;
};

/// Waits for the counts of all ranks, of which this one knows its own.
void await(const HostContext& context, std::vector<Incoming>& incoming) {
  constexpr std::chrono::microseconds kSoon{20};
  constexpr auto kRound = static_cast<std::uint32_t>(Round::counts);
  constexpr const char* kWhat = "the counts";
  const auto ranks = std::views::iota(0, context.size());
  const auto isMissing = [&](int rank) {
    return !context.masked(rank) && !incoming[static_cast<std::size_t>(rank)].complete();
  };
  const auto complete = [&] { return std::ranges::none_of(ranks, isMissing); };
  const auto missing = [&] {
    Awaited late{{}, kWhat};
    std::ranges::copy_if(ranks, std::back_inserter(late.ranks), isMissing);
    return late;
  };
  context.mailbox.post(context.epoch, kRound, std::vector<Message>(incoming.size()), kWhat);
  if (spinUntil(complete, kSoon)) return;
  // No GPU wakes a host that sleeps: its own host does, when it has been told.
  context.mailbox.collect(context.epoch, kRound, kWhat);
  context.transport.wait(complete, missing);
}

}  // namespace

bool fitToldCounts(const ExpertPlacement& placement, int numRanks) {
  for (int rank = 0; rank < numRanks; ++rank) {
    if (1 + placement.numLocal(rank) > static_cast<std::int64_t>(kCountWords)) return false;
  }
  return true;
}

void receiveToldCounts(const HostContext& context, std::int64_t numLocalExperts,
                       DispatchPlan& plan) {
  const TraceScope scope(context.trace, "counts");
  const auto experts = static_cast<std::size_t>(numLocalExperts);
  const ControlMap map(context.size());
  std::vector<Incoming> incoming;
  incoming.reserve(static_cast<std::size_t>(context.size()));
  for (int rank = 0; rank < context.size(); ++rank) {
    incoming.emplace_back(context.transport.control(context.rank()) + map.counts(rank), 1 + experts,
                          context.epoch);
  }
  await(context, incoming);
  plan.perExpert.assign(experts, 0);
  for (std::size_t r = 0; r < incoming.size(); ++r) {
    if (context.masked(r)) {
      plan.numRowsFrom[r] = 0;
      continue;
    }
    // Counts that are out of range are refused where they were given, before rows move.
    plan.numRowsFrom[r] = std::min(incoming[r][0], plan.numRowsFrom[r]);
    for (std::size_t e = 0; e < experts; ++e) plan.perExpert[e] += incoming[r][1 + e];
  }
}

}  // namespace mscclpp_ep
