// SPDX-License-Identifier: MIT
#include "cuda/routing.hpp"

#include <span>
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

/// Waits until the GPU has written the report of a plan. What comes before it on the caller's
/// stream may take any time, so only an error or the user ends this.
void awaitReport(const Context& context, const PlanReport& report, std::uint64_t ticket) {
  awaitWatching([&] { return acquire(report.ticket) == ticket; },
                [&] {
                  requireNoFailure(context.stream);
                  context.pollInterrupt();
                });
}

template <typename T>
std::vector<T> takeCounts(const std::int32_t*& counts, std::int64_t count) {
  std::vector<T> values(counts, counts + count);
  counts += count;
  return values;
}

void readReport(PlanReport& report, const DispatchRequest& request, int numRanks,
                Routing& routing) {
  const std::int64_t experts = request.placement->numExperts();
  if (report.badPlace >= 0) {
    throwBadId(report.badPlace, request.inputs.topkIdx.shape[1], report.badId, experts);
  }
  const std::int32_t* counts = report.counts();
  auto plan = std::make_shared<SendPlan>();
  plan->numRows = takeCounts<std::int64_t>(counts, numRanks);
  routing.plan = std::move(plan);
  routing.perRank = takeCounts<std::int32_t>(counts, numRanks);
  routing.perExpert = takeCounts<std::int32_t>(counts, experts);
  if (request.inputs.topkIdx) routing.choices = takeCounts<std::int64_t>(counts, experts);
}

}  // namespace

TopkArrays topkOf(const DispatchInputs& inputs) {
  if (!inputs.topkIdx) return {};
  return {inputs.topkIdx.data, static_cast<const float*>(inputs.topkWeights.data),
          inputs.topkIdx.shape[1], inputs.topkIdx.dtype == DataType::int64};
}

void examineRouting(Context& context, PlanReporter& reporter, const PlacementArrays& placement,
                    DispatchRequest& request) {
  const bool hostWaits = request.options.numWorstTokens == 0;
  EP_EXPECTS(!hostWaits || !context.capturing,
             "num_worst_tokens is 0, so that the host would wait for counts, which it cannot while "
             "a graph is captured; give num_worst_tokens, or a handle");
  const auto routing = makeRouting(context, request);
  reporter.reserve(context.size(), placement.numExperts);
  PlanArguments plan;
  plan.inRank = static_cast<const std::uint8_t*>(request.inputs.isTokenInRank.data);
  plan.numTokens = request.numTokens;
  plan.numRanks = context.size();
  plan.topk = topkOf(request.inputs);
  plan.placement = placement;
  plan.perRank = static_cast<const std::int32_t*>(request.inputs.numTokensPerRank.data);
  plan.perExpert = static_cast<const std::int32_t*>(request.inputs.numTokensPerExpert.data);
  plan.head = routing->head;
  plan.sent = routing->count(CountsMap(context.size(), routing->numLocalExperts).sent());
  plan.shownHead = static_cast<std::int32_t*>(routing->shownHead.view.data);
  plan.shownInRank = static_cast<std::uint8_t*>(routing->shownInRank.view.data);
  plan.scratch = reporter.scratch();
  plan.report = hostWaits ? reporter.report() : nullptr;
  plan.notice = reporter.notice();
  plan.ticket = reporter.nextTicket();
  planDispatch(plan, context.stream);
  request.routing.onGpu = routing;
  if (!hostWaits) return;
  awaitReport(context, *reporter.report(), plan.ticket);
  readReport(*reporter.report(), request, context.size(), request.routing);
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
