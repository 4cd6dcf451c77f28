// SPDX-License-Identifier: MIT
#include "core/validate.hpp"

#include <limits>

#include "core/check.hpp"
#include "core/check_tensor.hpp"

namespace mscclpp_ep {

namespace {

constexpr std::int64_t kMostRows = std::numeric_limits<std::int32_t>::max();
// Sums of time points stay far from the end of a 64-bit clock of nanoseconds.
constexpr double kLongestTimeout = 1e9;

/// Fills in what x and the scales say of the rows.
void describeRows(const BufferFacts& facts, const DispatchInputs& inputs, Signature& signature) {
  checkTensor(inputs.x, facts.options.device, {"x", {}, {kAnyExtent, kAnyExtent}, "[T, H]"});
  signature.dtype = static_cast<std::uint32_t>(inputs.x.dtype);
  signature.hidden = inputs.x.shape[1];
  EP_EXPECTS(signature.hidden > 0, "x is ", toString(inputs.x), "; H must be at least 1");
  if (!inputs.scales) return;
  checkTensor(inputs.scales, facts.options.device,
              {"the scales of x", {}, {inputs.x.shape[0], kAnyExtent}, "[T, S]", false});
  EP_EXPECTS(itemSize(inputs.scales.dtype) <= 4, "the scales of x are ", toString(inputs.scales),
             "; a scale must have 1, 2 or 4 bytes");
  signature.scaleDtype = static_cast<std::uint32_t>(inputs.scales.dtype);
  signature.numScales = inputs.scales.shape[1];
}

/// Fills in what top-k says.
void describeTopk(const BufferFacts& facts, DispatchRequest& request) {
  const DispatchInputs& inputs = request.inputs;
  Signature& signature = request.signature;
  EP_EXPECTS(!inputs.topkIdx == !inputs.topkWeights, "topk_idx is ", toString(inputs.topkIdx),
             " and topk_weights is ", toString(inputs.topkWeights), "; give both or neither");
  if (!inputs.topkIdx) return;
  checkTopkIdx(inputs.topkIdx, facts, inputs.x.shape[0]);
  signature.topk = inputs.topkIdx.shape[1];
  checkTensor(inputs.topkWeights, facts.options.device,
              {"topk_weights",
               {DataType::float32},
               {inputs.x.shape[0], signature.topk},
               "[T, K], as topk_idx"});
  signature.hasWeights = 1;
  signature.indexBytes = static_cast<std::int64_t>(itemSize(inputs.topkIdx.dtype));
}

void checkDispatchOptions(const DispatchOptions& options, bool topk) {
  EP_EXPECTS(options.expertAlignment >= 1 && options.expertAlignment <= kMostRows,
             "expert_alignment is ", options.expertAlignment, "; it must be 1 to ", kMostRows);
  EP_EXPECTS(options.numWorstTokens >= 0 && options.numWorstTokens <= kMostRows,
             "num_worst_tokens is ", options.numWorstTokens, "; it must be 0 (not given) to ",
             kMostRows);
  EP_EXPECTS(options.numWorstTokens == 0 || topk, "num_worst_tokens is ", options.numWorstTokens,
             ", which needs topk_idx and topk_weights: rows not received are told by index -1");
}

void checkHidden(const HandleState& handle, const TensorView& x) {
  EP_EXPECTS(handle.opaqueRows || isOpaque(x.dtype) || x.shape[1] == handle.hidden, "x is ",
             toString(x), ", but the dispatch that made the handle had H = ", handle.hidden);
}

}  // namespace

const HandleState& checkHandle(const BufferFacts& facts, const DispatchHandle& handle) {
  EP_EXPECTS(handle, "handle is empty; it must be one that this buffer's dispatch returned");
  EP_EXPECTS(handle.state()->bufferId == facts.bufferId,
             "handle was made by another buffer; it must be one that this buffer's dispatch "
             "returned");
  return *handle.state();
}

void validateOptions(const BufferOptions& options, int numRanks) {
  const double timeout = options.timeout.count();
  EP_EXPECTS(timeout > 0 && timeout <= kLongestTimeout, "timeout is ", timeout,
             " s; it must be more than 0 and at most ", kLongestTimeout);
  EP_EXPECTS(options.arenaBytes >= 0, "num_nvl_bytes is ", options.arenaBytes,
             "; it must not be negative");
  EP_EXPECTS(options.maxArenaBytes >= 0, "max_arena_bytes is ", options.maxArenaBytes,
             "; it must not be negative (0: a default by the memory that is free)");
  EP_EXPECTS(options.numThreads >= 0 && options.numThreads <= 1024, "num_threads is ",
             options.numThreads, "; it must be 0 (a default) to 1024");
  EP_EXPECTS(options.smMargin >= 0, "sm_margin is ", options.smMargin, "; it must not be negative");
  EP_EXPECTS(options.ranksPerDomain >= 0, "ranks_per_domain is ", options.ranksPerDomain,
             "; it must not be negative (0: found at run time)");
  if (options.ranksPerDomain != 0 && options.ranksPerDomain < numRanks) {
    throw NotBuilt(cat("ranks_per_domain is ", options.ranksPerDomain, ", with ", numRanks,
                       " ranks; this version serves one domain, that is ranks of one host"));
  }
  for (std::size_t e = 0; e < options.expertMap.size(); ++e) {
    EP_EXPECTS(options.expertMap[e] >= 0 && options.expertMap[e] < numRanks, "expert_map[", e,
               "] is ", options.expertMap[e], "; it must be a rank, 0 to ", numRanks - 1);
  }
}

void validateCall(const BufferFacts& facts, const CallOptions& call) {
  EP_EXPECTS(facts.options.device.type != DeviceType::cpu || !call.stream.given(),
             "a stream was given to a buffer on the CPU, which takes none");
  EP_EXPECTS(call.numSms >= 0, "num_sms is ", call.numSms, "; it must not be negative");
}

void validateLayout(const BufferFacts& facts, const TensorView& topkIdx, std::int64_t numExperts,
                    const LayoutOutputs& outputs) {
  const Device& device = facts.options.device;
  checkNumExperts(facts, numExperts);
  EP_EXPECTS(topkIdx, "topk_idx is missing; it must be [T, K]");
  checkTopkIdx(topkIdx, facts, kAnyExtent);
  // On a GPU an id out of range is no choice.
  if (device.type == DeviceType::cpu) checkIds(topkIdx, numExperts);
  const DataType count = DataType::int32;
  checkTensor(outputs.numTokensPerRank, device,
              {"num_tokens_per_rank", {count}, {facts.numRanks}, "[R]"});
  checkTensor(outputs.numTokensPerExpert, device,
              {"num_tokens_per_expert", {count}, {numExperts}, "[E]"});
  checkTensor(
      outputs.isTokenInRank, device,
      {"is_token_in_rank", {DataType::boolean}, {topkIdx.shape[0], facts.numRanks}, "[T, R]"});
}

DispatchRequest validateDispatch(const BufferFacts& facts, const DispatchInputs& inputs,
                                 const DispatchOptions& options) {
  const Device& device = facts.options.device;
  DispatchRequest request;
  request.inputs = inputs;
  request.options = options;
  Signature& signature = request.signature;
  signature.operation = static_cast<std::uint32_t>(Operation::dispatch);
  describeRows(facts, inputs, signature);
  request.numTokens = inputs.x.shape[0];
  checkTensor(inputs.isTokenInRank, device,
              {"is_token_in_rank",
               {DataType::boolean},
               {request.numTokens, facts.numRanks},
               "[T, R], of as many tokens as x"});
  checkTensor(inputs.numTokensPerRank, device,
              {"num_tokens_per_rank", {DataType::int32}, {facts.numRanks}, "[R]"});
  checkTensor(inputs.numTokensPerExpert, device,
              {"num_tokens_per_expert", {DataType::int32}, {kAnyExtent}, "[E]"});
  signature.numExperts = inputs.numTokensPerExpert.shape[0];
  checkNumExperts(facts, signature.numExperts);
  describeTopk(facts, request);
  checkDispatchOptions(options, signature.topk >= 0);
  EP_EXPECTS(request.numTokens <= std::numeric_limits<std::int32_t>::max(), "x is ",
             toString(inputs.x), "; T must be below 2^31");
  return request;
}

DispatchRequest validateCachedDispatch(const BufferFacts& facts, const DispatchInputs& inputs,
                                       const DispatchHandle& handle) {
  const HandleState& state = checkHandle(facts, handle);
  const char* why = "when a handle is given, whose routing is repeated";
  checkAbsent(inputs.topkIdx, "topk_idx", why);
  checkAbsent(inputs.topkWeights, "topk_weights", why);
  DispatchRequest request;
  request.inputs = inputs;
  Signature& signature = request.signature;
  signature.operation = static_cast<std::uint32_t>(Operation::cachedDispatch);
  describeRows(facts, inputs, signature);
  EP_EXPECTS(inputs.x.shape[0] == state.numTokens, "x is ", toString(inputs.x),
             ", but the dispatch that made the handle had T = ", state.numTokens);
  checkHidden(state, inputs.x);
  signature.numExperts = state.numExperts;
  signature.handleEpoch = state.epoch;
  request.numTokens = state.numTokens;
  request.routing.plan = state.plan;
  request.routing.onGpu = state.onGpu;
  request.cached = handle.state();
  return request;
}

void validateDispatchOutputs(const PendingState& pending, const DispatchOutputs& outputs) {
  const DispatchRequest& request = pending.request;
  const Signature& signature = request.signature;
  const Device device = request.inputs.x.device;
  const std::int64_t rows = pending.numRows;
  checkTensor(outputs.x, device,
              {"the output of x", {request.inputs.x.dtype}, {rows, signature.hidden}, "[N, H]"});
  if (signature.numScales > 0) {
    checkTensor(outputs.scales, device,
                {"the output of the scales",
                 {request.inputs.scales.dtype},
                 {rows, signature.numScales},
                 "[N, S]"});
  }
  if (signature.topk < 0) {
    checkAbsent(outputs.topkIdx, "the output of topk_idx", "when no topk_idx is sent");
    checkAbsent(outputs.topkWeights, "the output of topk_weights", "when no topk_idx is sent");
    return;
  }
  checkTensor(
      outputs.topkIdx, device,
      {"the output of topk_idx", {request.inputs.topkIdx.dtype}, {rows, signature.topk}, "[N, K]"});
  checkTensor(
      outputs.topkWeights, device,
      {"the output of topk_weights", {DataType::float32}, {rows, signature.topk}, "[N, K]"});
}

CombineRequest validateCombine(const BufferFacts& facts, const CombineInputs& inputs,
                               const DispatchHandle& handle, const CombineOutputs& outputs) {
  const Device& device = facts.options.device;
  const HandleState& state = checkHandle(facts, handle);
  checkTensor(inputs.x, device,
              {"x",
               {DataType::bfloat16, DataType::float16, DataType::float32},
               {state.numRows, kAnyExtent},
               "[N, H], a row for each that the dispatch received"});
  checkHidden(state, inputs.x);
  const DataType dtype = inputs.x.dtype;
  const std::int64_t hidden = inputs.x.shape[1];
  EP_EXPECTS(hidden > 0, "x is ", toString(inputs.x), "; H must be at least 1");
  const std::int64_t tokens = state.numTokens;
  EP_EXPECTS(inputs.bias0 || !inputs.bias1, "the second bias is given without the first");
  for (const TensorView* bias : {&inputs.bias0, &inputs.bias1}) {
    if (!*bias) continue;
    checkTensor(*bias, device, {"bias", {dtype}, {tokens, hidden}, "[T, H] of x's dtype"});
  }
  checkTensor(outputs.x, device, {"the output of x", {dtype}, {tokens, hidden}, "[T, H]"});

  CombineRequest request{
      .signature = {}, .inputs = inputs, .outputs = outputs, .call = {}, .handle = handle.state()};
  Signature& signature = request.signature;
  signature.operation = static_cast<std::uint32_t>(Operation::combine);
  signature.dtype = static_cast<std::uint32_t>(dtype);
  signature.hidden = hidden;
  signature.numExperts = state.numExperts;
  signature.handleEpoch = state.epoch;
  if (!inputs.topkWeights) {
    checkAbsent(outputs.topkWeights, "the output of topk_weights", "when no weights are given");
    return request;
  }
  checkTensor(inputs.topkWeights, device,
              {"topk_weights",
               {DataType::float32},
               {state.numRows, state.topk >= 0 ? state.topk : kAnyExtent},
               "[N, K], a row for each that the dispatch received"});
  signature.topk = inputs.topkWeights.shape[1];
  signature.hasWeights = 1;
  checkTensor(
      outputs.topkWeights, device,
      {"the output of topk_weights", {DataType::float32}, {tokens, signature.topk}, "[T, K]"});
  return request;
}

}  // namespace mscclpp_ep
