// SPDX-License-Identifier: MIT
#include "cuda/routing.hpp"

#include <algorithm>
#include <utility>

#include "core/memory_map.hpp"
#include "cuda/await.hpp"

namespace mscclpp_ep::cuda {

namespace {

std::shared_ptr<DeviceRouting> makeRouting(const Context& context, const DispatchRequest& request) {
  auto routing = std::make_shared<DeviceRouting>();
  routing->numLocalExperts = request.placement->numLocal(context.rank());
  const std::int64_t numCells = request.numTokens * context.size();
  const CountsMap map(context.size(), routing->numLocalExperts);
  std::size_t bytes = 0;
  const auto place = [&](std::int64_t count, std::size_t itemBytes) {
    return std::exchange(bytes, alignUp(bytes + arrayBytes(count, itemBytes), kRegionAlignment));
  };
  const std::size_t head = place(numCells, sizeof(std::int32_t));
  const std::size_t shownHead = place(numCells, sizeof(std::int32_t));
  const std::size_t shownInRank = place(numCells, sizeof(std::uint8_t));
  const std::size_t counts = place(map.size(), sizeof(std::int32_t));
  routing->memory = context.take(bytes);
  std::byte* memory = routing->memory.get();
  const auto show = [&](std::size_t offset, DataType dtype) {
    Tensor tensor;
    tensor.owner = routing->memory;
    tensor.view =
        makeView(memory + offset, dtype, {request.numTokens, context.size()}, context.onDevice());
    return tensor;
  };
  routing->head = reinterpret_cast<std::int32_t*>(memory + head);
  routing->counts = reinterpret_cast<std::int32_t*>(memory + counts);
  routing->shownHead = show(shownHead, DataType::int32);
  routing->shownInRank = show(shownInRank, DataType::boolean);
  return routing;
}

/// Throws CudaError if work on a stream has failed.
void requireNoFailure(cudaStream_t stream) {
  const RelaxedCapture relaxed;
  (void)isDone(cudaStreamQuery(stream), "what came before a dispatch failed");
}

/// What the GPU tells of the last plan.
class PlanReport {
 public:
  PlanReport(const PlanReporter& reporter, int numRanks, std::int64_t numExperts)
      : words_(reporter.report()),
        map_(numRanks, numExperts),
        tag_(static_cast<std::uint32_t>(reporter.ticket())) {}

  const ReportMap& map() const { return map_; }
  bool hasCome(std::int64_t place) const { return signalTag(acquire(words_[place])) == tag_; }
  std::int32_t at(std::int64_t place) const {
    return static_cast<std::int32_t>(signalValue(words_[place]));
  }
  std::int64_t longAt(std::int64_t place) const {
    return static_cast<std::int64_t>(std::uint64_t{signalValue(words_[place + 1])} << 32 |
                                     signalValue(words_[place]));
  }
  template <typename T>
  std::vector<T> counts(std::int64_t place, std::int64_t end) const {
    std::vector<T> values;
    values.reserve(static_cast<std::size_t>(end - place));
    for (; place < end; ++place) values.push_back(at(place));
    return values;
  }

 private:
  const std::uint64_t* words_;
  ReportMap map_;
  std::uint32_t tag_;
};

/// Waits until the GPU has written what is from a place to another. What comes before that on the
/// caller's stream may take any time, so only an error or the user ends this.
void awaitReport(const Context& context, const PlanReport& report, std::int64_t begin,
                 std::int64_t end) {
  const auto complete = [&] {
    while (begin < end && report.hasCome(begin)) ++begin;
    return begin == end;
  };
  awaitWatching(complete, [&] {
    requireNoFailure(context.stream);
    context.pollInterrupt();
  });
}

/// Throws InvalidArgument for counts that the caller gave and that are not what was found.
[[noreturn]] void refuseCounts(const Context& context, const PlanReport& report,
                               const DispatchRequest& request) {
  const ReportMap& map = report.map();
  awaitReport(context, report, 0, map.size());
  Routing found;
  SendPlan plan;
  plan.numRows = report.counts<std::int64_t>(map.sent(), map.choices());
  found.plan = std::make_shared<const SendPlan>(std::move(plan));
  if (request.inputs.topkIdx) {
    found.choices = report.counts<std::int64_t>(map.choices(), map.size());
  }
  found.perRank = report.counts<std::int32_t>(map.perRank(), map.perExpert());
  found.perExpert = report.counts<std::int32_t>(map.perExpert(), map.findings());
  checkCounts(found);
  throw InvalidArgument(
      "num_tokens_per_rank or num_tokens_per_expert are not the counts of is_token_in_rank and "
      "topk_idx");
}

/// Whether the other ranks can be told the counts before it is known whether they are right.
bool plausible(const DispatchRequest& request) {
  const std::vector<std::int64_t>& perRank = request.routing.plan->numRows;
  const std::vector<std::int32_t>& perExpert = request.routing.perExpert;
  return std::ranges::all_of(
             perRank, [&](std::int64_t rows) { return rows >= 0 && rows <= request.numTokens; }) &&
         std::ranges::all_of(perExpert, [](std::int32_t count) { return count >= 0; });
}

void launchPlan(const Context& context, PlanReporter& reporter, const PlacementArrays& placement,
                const DispatchRequest& request, const DeviceRouting& routing, bool hostWaits,
                const CountBoards* boards, std::uint64_t epoch) {
  const CountsMap map(context.size(), routing.numLocalExperts);
  reporter.reserve(context.size(), placement.numExperts, map.size());
  PlanArguments plan;
  plan.inRank = static_cast<const std::uint8_t*>(request.inputs.isTokenInRank.data);
  plan.numTokens = request.numTokens;
  plan.numRanks = context.size();
  plan.topk = topkOf(request.inputs);
  plan.placement = placement;
  plan.perRank = static_cast<const std::int32_t*>(request.inputs.numTokensPerRank.data);
  plan.perExpert = static_cast<const std::int32_t*>(request.inputs.numTokensPerExpert.data);
  plan.head = routing.head;
  plan.sent = routing.count(map.sent());
  plan.shownHead = static_cast<std::int32_t*>(routing.shownHead.view.data);
  plan.shownInRank = static_cast<std::uint8_t*>(routing.shownInRank.view.data);
  plan.scratch = reporter.scratch();
  plan.report = hostWaits ? reporter.report() : nullptr;
  if (boards != nullptr) {
    plan.boards = boards->places();
    plan.tellsAll = true;
    plan.epoch = epoch;
  }
  plan.notice = reporter.notice();
  plan.ticket = reporter.nextTicket();
  planDispatch(plan, context.stream);
}

}  // namespace

void awaitCounts(const Context& context, const PlanReporter& reporter, DispatchRequest& request) {
  const PlanReport report(reporter, context.size(), request.placement->numExperts());
  const ReportMap& map = report.map();
  const bool follow = request.routing.countsFollow;
  awaitReport(context, report, 0, follow ? map.perExpert() : map.findings());
  SendPlan plan;
  plan.numRows = report.counts<std::int64_t>(map.perRank(), map.perExpert());
  request.routing.plan = std::make_shared<const SendPlan>(std::move(plan));
  if (follow) return;
  request.routing.perExpert = report.counts<std::int32_t>(map.perExpert(), map.findings());
  if (!plausible(request)) verifyRouting(context, reporter, request);
}

TopkArrays topkOf(const DispatchInputs& inputs) {
  if (!inputs.topkIdx) return {};
  return {inputs.topkIdx.data, static_cast<const float*>(inputs.topkWeights.data),
          inputs.topkIdx.shape[1], inputs.topkIdx.dtype == DataType::int64};
}

void examineRouting(Context& context, PlanReporter& reporter, const PlacementArrays& placement,
                    DispatchRequest& request, const CountBoards* boards, std::uint64_t epoch) {
  const bool hostWaits = request.options.numWorstTokens == 0;
  EP_EXPECTS(!hostWaits || !context.capturing,
             "num_worst_tokens is 0, so that the host would wait for counts, which it cannot while "
             "a graph is captured; give num_worst_tokens, or a handle");
  if (!hostWaits) boards = nullptr;
  const auto routing = makeRouting(context, request);
  launchPlan(context, reporter, placement, request, *routing, hostWaits, boards, epoch);
  request.routing.onGpu = routing;
  request.routing.countsFollow = boards != nullptr;
}

void verifyRouting(const Context& context, const PlanReporter& reporter,
                   const DispatchRequest& request) {
  const PlanReport report(reporter, context.size(), request.placement->numExperts());
  const ReportMap& map = report.map();
  awaitReport(context, report, map.findings(), map.sent());
  if (const std::int64_t bad = report.longAt(map.badPlace()); bad != 0) {
    throwBadId(bad - 1, request.inputs.topkIdx.shape[1], report.longAt(map.badId()),
               request.placement->numExperts());
  }
  if (report.at(map.countsDiffer()) != 0) refuseCounts(context, report, request);
}

HandleFields makeFields(const Context& context, const DeviceRouting& routing) {
  const std::int64_t ranks = context.size();
  const CountsMap map(context.size(), routing.numLocalExperts);
  const auto part = [&](std::int64_t at, std::initializer_list<std::int64_t> shape) {
    Tensor tensor;
    tensor.view = makeView(routing.count(at), DataType::int32, shape, context.onDevice());
    tensor.owner = routing.memory;
    return tensor;
  };
  HandleFields fields;
  fields.numRecvTokens = part(map.numRecv(), {1});
  fields.numRecvTokensPerExpert = part(map.perExpert(), {routing.numLocalExperts});
  fields.rankPrefixMatrix = part(map.prefixMatrix(), {ranks, ranks});
  fields.numSendTokens = part(map.sent(), {ranks, 1});
  fields.channelPrefix = part(map.channelPrefix(), {ranks, 1});
  return fields;
}

}  // namespace mscclpp_ep::cuda
