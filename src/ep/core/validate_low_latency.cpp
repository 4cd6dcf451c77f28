// SPDX-License-Identifier: MIT
#include "core/validate_low_latency.hpp"

#include <cstring>
#include <limits>

#include "core/check.hpp"
#include "core/check_tensor.hpp"

namespace mscclpp_ep {

namespace {

constexpr std::int64_t kMostSlots = std::numeric_limits<std::int32_t>::max();

/// The sizes of the outputs of a dispatch.
struct Extents {
  std::int64_t experts;  ///< L
  std::int64_t slots;    ///< R * M
  std::int64_t ranks;
};

/// The GPU has no low-latency mode yet.
void requireLowLatency(const BufferFacts& facts) {
  if (facts.options.device.type == DeviceType::cpu) return;
  throw NotBuilt(
      "low-latency operations on a GPU are not in this version of mscclpp_ep; use dispatch and "
      "combine, or a buffer on the CPU");
}

Extents extentsOf(const BufferFacts& facts, const LowLatencyDispatchOptions& options) {
  checkNumExperts(facts, options.numExperts);
  const ExpertPlacement placement(options.numExperts, facts.numRanks, facts.options.expertMap);
  const std::int64_t most = options.maxTokensPerRank;
  EP_EXPECTS(most >= 1 && most <= kMostSlots / facts.numRanks,
             "num_max_dispatch_tokens_per_rank is ", most, "; it must be 1 to ",
             kMostSlots / facts.numRanks);
  const Extents extents{placement.numLocal(facts.rank), most * facts.numRanks, facts.numRanks};
  EP_EXPECTS(extents.experts <= kMostSlots / extents.slots, "with ", extents.experts,
             " experts on this rank, ", facts.numRanks,
             " ranks and num_max_dispatch_tokens_per_rank ", most,
             " there would be more than 2^31 rows; give a smaller one");
  return extents;
}

void checkQuantization(const LowLatencyDispatchInputs& inputs, Quantization quantization) {
  EP_EXPECTS(quantization == Quantization::none || inputs.x.dtype == DataType::bfloat16, "x is ",
             toString(inputs.x), "; with use_fp8 it must be bfloat16");
}

void checkDispatchInputs(const BufferFacts& facts, const LowLatencyDispatchInputs& inputs,
                         const LowLatencyDispatchOptions& options) {
  const Device& device = facts.options.device;
  checkTensor(inputs.x, device, {"x", {}, {kAnyExtent, kAnyExtent}, "[T, H]"});
  EP_EXPECTS(inputs.x.shape[1] > 0, "x is ", toString(inputs.x), "; H must be at least 1");
  EP_EXPECTS(inputs.x.shape[0] <= options.maxTokensPerRank, "x is ", toString(inputs.x),
             "; T must be at most num_max_dispatch_tokens_per_rank, ", options.maxTokensPerRank);
  checkQuantization(inputs, options.quantization);
  EP_EXPECTS(inputs.topkIdx, "topk_idx is missing; it must be [T, K]");
  checkTopkIdx(inputs.topkIdx, facts, inputs.x.shape[0]);
  checkIds(inputs.topkIdx, options.numExperts);
  if (!inputs.topkWeights) return;
  checkTensor(inputs.topkWeights, device,
              {"topk_weights",
               {DataType::float32},
               {inputs.x.shape[0], inputs.topkIdx.shape[1]},
               "[T, K], as topk_idx"});
}

void checkStats(const TensorView& stats, const Device& device, const Expected& expected) {
  if (stats) checkTensor(stats, device, expected);
}

void checkScales(const LowLatencyDispatchOutputs& outputs, const Device& device,
                 Quantization quantization, const Extents& extents, std::int64_t hidden) {
  if (quantization == Quantization::none) {
    return checkAbsent(outputs.scales, "the output of the scales", "when rows are not quantised");
  }
  const std::int64_t scales = roundUp(hidden, 128) / 128;
  if (quantization == Quantization::float8Ue8m0) {
    return checkTensor(outputs.scales, device,
                       {"the output of the scales",
                        {DataType::int32},
                        {extents.experts, extents.slots, roundUp(scales, 4) / 4},
                        "[L, R * M, ceil(H / 512)]",
                        false});
  }
  checkTensor(outputs.scales, device,
              {"the output of the scales",
               {DataType::float32},
               {extents.experts, extents.slots, scales},
               "[L, R * M, ceil(H / 128)]",
               false});
}

void checkDispatchOutputs(const BufferFacts& facts, const LowLatencyDispatchRequest& request,
                          const Extents& extents) {
  const Device& device = facts.options.device;
  const LowLatencyDispatchOutputs& outputs = request.outputs;
  const Quantization quantization = request.options.quantization;
  const DataType dtype =
      quantization == Quantization::none ? request.inputs.x.dtype : DataType::float8E4m3;
  const std::int64_t hidden = request.inputs.x.shape[1];
  checkTensor(
      outputs.x, device,
      {"the output of x", {dtype}, {extents.experts, extents.slots, hidden}, "[L, R * M, H]"});
  checkScales(outputs, device, quantization, extents, hidden);
  checkTensor(outputs.recvCount, device,
              {"the output of the counts", {DataType::int32}, {extents.experts}, "[L]"});
  checkTensor(outputs.sourceIndex, device,
              {"the output of the sources",
               {DataType::int32},
               {extents.experts, extents.slots},
               "[L, R * M]"});
  checkTensor(
      outputs.layoutRange, device,
      {"the output of the ranges", {DataType::int64}, {extents.experts, extents.ranks}, "[L, R]"});
  checkStats(outputs.recvStats, device,
             {"cumulative_local_expert_recv_stats", {DataType::int32}, {extents.experts}, "[L]"});
  checkStats(outputs.waitStats, device,
             {"dispatch_wait_recv_cost_stats", {DataType::int64}, {extents.ranks}, "[R]"});
}

const LowLatencyState& checkHandle(const BufferFacts& facts, const LowLatencyHandle& handle) {
  EP_EXPECTS(handle, "handle is empty; it must be one that low_latency_dispatch returned");
  EP_EXPECTS(handle.state()->bufferId == facts.bufferId,
             "handle was made by another buffer; it must be one that this buffer's "
             "low_latency_dispatch returned");
  EP_EXPECTS(handle.state()->complete,
             "the dispatch of handle has not been received; call its hook first");
  return *handle.state();
}

template <typename Index>
void checkSameChoices(const TensorView& topkIdx, const LowLatencyState& state) {
  const auto* given = static_cast<const Index*>(topkIdx.data);
  for (std::size_t i = 0; i < state.topkIdx.size(); ++i) {
    EP_EXPECTS(given[i] == state.topkIdx[i], "topk_idx[", static_cast<std::int64_t>(i) / state.topk,
               ", ", static_cast<std::int64_t>(i) % state.topk, "] is ", given[i],
               ", but the dispatch that made the handle was given ", state.topkIdx[i]);
  }
}

void checkChoices(const BufferFacts& facts, const LowLatencyCombineInputs& inputs,
                  const LowLatencyState& state) {
  const Device& device = facts.options.device;
  const char* shape = "[T, K], as the dispatch was given it";
  checkTensor(
      inputs.topkIdx, device,
      {"topk_idx", {DataType::int32, DataType::int64}, {state.numTokens, state.topk}, shape});
  if (inputs.topkIdx.dtype == DataType::int32) {
    checkSameChoices<std::int32_t>(inputs.topkIdx, state);
  } else {
    checkSameChoices<std::int64_t>(inputs.topkIdx, state);
  }
  checkTensor(inputs.topkWeights, device,
              {"topk_weights", {DataType::float32}, {state.numTokens, state.topk}, shape});
  const auto* weights = static_cast<const float*>(inputs.topkWeights.data);
  const bool changed =
      !state.ownWeights.empty() &&
      std::memcmp(weights, state.ownWeights.data(), state.ownWeights.size() * sizeof(float)) != 0;
  EP_EXPECTS(!changed,
             "topk_weights differ from those that the dispatch was given and has sent along; give "
             "the same, or none to the dispatch");
}

}  // namespace

LowLatencyDispatchRequest validateLowLatencyDispatch(const BufferFacts& facts,
                                                     const LowLatencyDispatchInputs& inputs,
                                                     const LowLatencyDispatchOptions& options,
                                                     const LowLatencyDispatchOutputs& outputs) {
  requireLowLatency(facts);
  LowLatencyDispatchRequest request{.signature = {},
                                    .inputs = inputs,
                                    .options = options,
                                    .outputs = outputs,
                                    .call = {},
                                    .placement = nullptr};
  const Extents extents = extentsOf(facts, options);
  checkDispatchInputs(facts, inputs, options);
  checkDispatchOutputs(facts, request, extents);
  Signature& signature = request.signature;
  signature.operation = static_cast<std::uint32_t>(Operation::lowLatencyDispatch);
  signature.dtype = static_cast<std::uint32_t>(inputs.x.dtype);
  signature.hidden = inputs.x.shape[1];
  signature.topk = inputs.topkIdx.shape[1];
  signature.hasWeights = inputs.topkWeights ? 1 : 0;
  signature.numExperts = options.numExperts;
  signature.maxTokens = options.maxTokensPerRank;
  signature.quantization = static_cast<std::uint32_t>(options.quantization);
  return request;
}

LowLatencyCombineRequest validateLowLatencyCombine(const BufferFacts& facts,
                                                   const LowLatencyCombineInputs& inputs,
                                                   const LowLatencyHandle& handle,
                                                   const LowLatencyCombineOptions& options,
                                                   const LowLatencyCombineOutputs& outputs) {
  requireLowLatency(facts);
  const Device& device = facts.options.device;
  const LowLatencyState& state = checkHandle(facts, handle);
  checkTensor(
      inputs.x, device,
      {"x",
       {DataType::bfloat16, DataType::float16, DataType::float32},
       {state.placement->numLocal(facts.rank), state.maxTokens * facts.numRanks, kAnyExtent},
       "[L, R * M, H], as low_latency_dispatch returned it"});
  const DataType dtype = inputs.x.dtype;
  const std::int64_t hidden = inputs.x.shape[2];
  EP_EXPECTS(hidden > 0 && (state.opaqueRows || hidden == state.hidden), "x is ",
             toString(inputs.x), ", but the dispatch that made the handle had H = ", state.hidden);
  EP_EXPECTS(!options.logfmt || dtype == DataType::bfloat16, "x is ", toString(inputs.x),
             "; with use_logfmt it must be bfloat16");
  checkChoices(facts, inputs, state);
  checkTensor(outputs.x, device,
              {"the output of x", {dtype}, {state.numTokens, hidden}, "[T, H] of x's dtype"});
  checkStats(outputs.waitStats, device,
             {"combine_wait_recv_cost_stats", {DataType::int64}, {facts.numRanks}, "[R]"});

  LowLatencyCombineRequest request{.signature = {},
                                   .inputs = inputs,
                                   .options = options,
                                   .outputs = outputs,
                                   .call = {},
                                   .handle = handle.state()};
  Signature& signature = request.signature;
  signature.operation = static_cast<std::uint32_t>(Operation::lowLatencyCombine);
  signature.dtype = static_cast<std::uint32_t>(dtype);
  signature.hidden = hidden;
  signature.topk = state.topk;
  signature.hasWeights = 1;
  signature.numExperts = state.placement->numExperts();
  signature.maxTokens = state.maxTokens;
  signature.handleEpoch = state.epoch;
  signature.exact = options.exact ? 1 : 0;
  signature.logfmt = options.logfmt ? 1 : 0;
  return request;
}

}  // namespace mscclpp_ep
