// SPDX-License-Identifier: MIT
#include "host/exchange_counts.hpp"

#include <limits>
#include <numeric>

#include "host/rounds.hpp"

namespace mscclpp_ep {

namespace {

/// Counts of this rank's choices, by the rank that holds the experts.
std::vector<std::vector<std::int32_t>> countsByRank(const HostContext& context,
                                                    const DispatchRequest& request) {
  std::vector<std::vector<std::int32_t>> counts(static_cast<std::size_t>(context.size()));
  if (request.cached != nullptr || request.routing.plan == nullptr) return counts;
  for (int r = 0; r < context.size(); ++r) {
    counts[static_cast<std::size_t>(r)] =
        request.placement->localPart(r, request.routing.perExpert);
  }
  return counts;
}

/// Whether every rank's counts fit into the slot of an entry. If not, all go in a round of their
/// own, into which a rank enters only when all take part: nobody may stop reading half-way.
bool countsFitEntry(const std::vector<std::vector<std::int32_t>>& counts) {
  std::size_t most = 0;
  for (const auto& part : counts) most = std::max(most, part.size());
  return sizeof(DispatchEntry) + most * sizeof(std::int32_t) <= kSlotPayload;
}

void addCounts(const Message& message, std::size_t offset, std::vector<std::int64_t>& sums) {
  if (message.size() - offset != sums.size() * sizeof(std::int32_t)) {
    throw PeerFailure("a rank sent counts for another number of experts");
  }
  for (std::size_t expert = 0; expert < sums.size(); ++expert) {
    std::int32_t count = 0;
    std::memcpy(&count, message.data() + offset + expert * sizeof(count), sizeof(count));
    if (count < 0) throw PeerFailure("a rank sent a negative count for an expert");
    sums[expert] += count;
  }
}

/// The rows that a rank says it has for this one: as few as its tokens, of which there are at most
/// 2^31 - 1.
std::int64_t rowsOf(const Message& message, std::size_t rank) {
  const std::int64_t rows = decode<DispatchEntry>(message).numRows;
  if (rows < 0 || rows > std::numeric_limits<std::int32_t>::max()) {
    throw PeerFailure(cat("rank ", rank, " announced ", rows, " rows"));
  }
  return rows;
}

void exchangeLongCounts(HostContext& context, const std::vector<std::vector<std::int32_t>>& counts,
                        std::vector<std::int64_t>& sums) {
  const TraceScope scope(context.trace, "counts");
  std::vector<Message> outgoing;
  for (const auto& part : counts) {
    const auto bytes = std::as_bytes(std::span(part));
    outgoing.emplace_back(bytes.begin(), bytes.end());
  }
  for (const Message& message :
       context.mailbox.exchange(context.epoch, static_cast<std::uint32_t>(Round::counts), outgoing,
                                "the counts per expert")) {
    if (message.empty()) continue;
    addCounts(message, 0, sums);
  }
}

/// What a rank is told.
std::int64_t rowsFor(const DispatchRequest& request, std::size_t rank) {
  if (request.routing.countsFollow) return request.numTokens;
  return request.countsOnHost() ? request.routing.plan->numRows[rank] : 0;
}

}  // namespace

DispatchPlan exchangeCounts(HostContext& context, const DispatchRequest& request,
                            const ReceiveCounts& receive) {
  const auto counts = countsByRank(context, request);
  const bool inEntry = countsFitEntry(counts);
  std::vector<Message> outgoing;
  for (std::size_t r = 0; r < counts.size(); ++r) {
    DispatchEntry entry;
    entry.signature = request.signature;
    entry.gpuEpoch = context.gpuEpoch;
    entry.numRows = rowsFor(request, r);
    entry.numCounts = static_cast<std::int64_t>(counts[r].size());
    outgoing.push_back(inEntry ? encode(entry, counts[r]) : encode(entry));
  }

  DispatchPlan plan;
  plan.perExpert.resize(counts[static_cast<std::size_t>(context.rank())].size());
  const auto& entries = exchangeEntries(context, outgoing);
  for (std::size_t r = 0; r < entries.size(); ++r) {
    const Message& message = entries[r];
    // Where routing is repeated rows keep their places: also those of a rank that is masked, and
    // one that was masked has none.
    if (!request.countsOnHost()) {
      plan.numRowsFrom.push_back(0);
    } else if (request.cached != nullptr) {
      plan.numRowsFrom.push_back(request.cached->numRowsFrom[r]);
    } else {
      plan.numRowsFrom.push_back(message.empty() ? 0 : rowsOf(message, r));
    }
    if (inEntry && !message.empty()) addCounts(message, sizeof(DispatchEntry), plan.perExpert);
  }
  if (!inEntry) exchangeLongCounts(context, counts, plan.perExpert);
  if (request.routing.countsFollow) receive(plan);

  plan.firstRowFrom = exclusivePrefixSum(plan.numRowsFrom);
  plan.numRecv = std::reduce(plan.numRowsFrom.begin(), plan.numRowsFrom.end());
  plan.numRows = plan.numRecv;
  if (request.cached != nullptr) {
    plan.perExpert = request.cached->perExpert;
    plan.numRows = request.cached->numRows;
  } else if (request.options.numWorstTokens > 0) {
    plan.numRows = request.options.numWorstTokens;
  }
  if (plan.numRecv > std::numeric_limits<std::int32_t>::max()) {
    const std::string why = cat(plan.numRecv, " rows would be received; at most 2^31 - 1 can be");
    abandonRows(context, Verdict::noRoom, why);
    throw OperationRefused{std::make_exception_ptr(InvalidArgument(why))};
  }
  return plan;
}

std::vector<std::int64_t> DispatchPlan::numKeptFrom() const {
  std::vector<std::int64_t> kept;
  kept.reserve(numRowsFrom.size());
  for (std::size_t r = 0; r < numRowsFrom.size(); ++r) {
    kept.push_back(rowsKept(firstRowFrom[r], numRowsFrom[r], numRows));
  }
  return kept;
}

void abandonRows(HostContext& context, Verdict verdict, std::string_view why) {
  const std::vector<Message> outgoing(static_cast<std::size_t>(context.size()),
                                      encode(refusal(verdict, why)));
  context.mailbox.post(context.epoch, static_cast<std::uint32_t>(Round::publish), outgoing,
                       "room for a message");
}

std::shared_ptr<HandleState> describeRouting(const HostContext& context,
                                             const DispatchRequest& request,
                                             const DispatchPlan& plan) {
  auto state = request.cached != nullptr ? std::make_shared<HandleState>(*request.cached)
                                         : std::make_shared<HandleState>();
  state->epoch = context.epoch;
  state->firstRowAt.clear();
  state->capacityAt.clear();
  if (request.cached != nullptr) return state;
  state->bufferId = context.bufferId;
  state->layout = request.options.layout;
  state->numTokens = request.numTokens;
  state->hidden = request.signature.hidden;
  state->topk = request.signature.topk;
  state->numExperts = request.signature.numExperts;
  state->opaqueRows = isOpaque(request.inputs.x.dtype);
  state->plan = request.routing.plan;
  state->onGpu = request.routing.onGpu;
  state->numRows = plan.numRows;
  if (!request.countsOnHost()) return state;
  state->firstRowFrom = plan.firstRowFrom;
  state->numRowsFrom = plan.numRowsFrom;
  state->perExpert = plan.perExpert;
  for (std::size_t r = 0; r < plan.numRowsFrom.size(); ++r) {
    state->rankPrefixSum.push_back(
        static_cast<std::int32_t>(plan.firstRowFrom[r] + plan.numRowsFrom[r]));
  }
  return state;
}

}  // namespace mscclpp_ep
