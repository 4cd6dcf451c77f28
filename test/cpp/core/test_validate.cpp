// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "core/validate.hpp"

namespace mscclpp_ep {
namespace {

template <typename E = InvalidArgument>
std::string messageOf(const std::function<void()>& work) {
  try {
    work();
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// A message must have all of: the argument, what was given, what is allowed.
void checkSays(const std::string& message, std::initializer_list<const char*> parts) {
  INFO("the message: " << message);
  for (const char* part : parts) {
    INFO("lacks: " << part);
    CHECK(message.find(part) != std::string::npos);
  }
}

constexpr int kRanks = 2;
constexpr std::int64_t kTokens = 3;
constexpr std::int64_t kHidden = 4;
constexpr std::int64_t kTopk = 2;
constexpr std::int64_t kExperts = 4;

/// Arguments of rank 0 of 2, all of them sound.
struct Arguments {
  std::vector<std::uint16_t> x = std::vector<std::uint16_t>(kTokens * kHidden);
  std::vector<float> scales = std::vector<float>(kTokens * 5);
  std::vector<std::int64_t> ids{0, 1, 2, -1, -1, -1};
  std::vector<float> weights = std::vector<float>(kTokens * kTopk);
  std::vector<std::uint8_t> inRank{1, 0, 0, 1, 0, 0};
  std::vector<std::int32_t> perRank{1, 1};
  std::vector<std::int32_t> perExpert{1, 1, 1, 0};
  BufferOptions options;
  BufferFacts facts{0, kRanks, 77, options};
  DispatchInputs inputs{
      makeView(x.data(), DataType::bfloat16, {kTokens, kHidden}),
      makeView(scales.data(), DataType::float32, {kTokens, 5}),
      makeView(ids.data(), DataType::int64, {kTokens, kTopk}),
      makeView(weights.data(), DataType::float32, {kTokens, kTopk}),
      makeView(inRank.data(), DataType::boolean, {kTokens, kRanks}),
      makeView(perRank.data(), DataType::int32, {kRanks}),
      makeView(perExpert.data(), DataType::int32, {kExperts}),
  };
  DispatchOptions dispatchOptions;

  DispatchRequest validate() const {
    DispatchRequest request = validateDispatch(facts, inputs, dispatchOptions);
    request.placement =
        std::make_shared<ExpertPlacement>(request.signature.numExperts, kRanks, options.expertMap);
    request.routing = readRouting(inputs, *request.placement);
    checkCounts(request.routing);
    return request;
  }
};

std::string dispatchMessage(const std::function<void(Arguments&)>& change) {
  Arguments arguments;
  change(arguments);
  return messageOf([&] { arguments.validate(); });
}

TEST_CASE("sound arguments of a dispatch become a request") {
  const Arguments arguments;
  const DispatchRequest request = arguments.validate();
  CHECK(request.numTokens == kTokens);
  CHECK(request.routing.plan->numRows == std::vector<std::int64_t>{1, 1});
  CHECK(request.routing.plan->head == std::vector<std::int32_t>{0, -1, -1, 0, -1, -1});
  CHECK(request.signature.operation == static_cast<std::uint32_t>(Operation::dispatch));
  CHECK(request.signature.hidden == kHidden);
  CHECK(request.signature.numScales == 5);
  CHECK(request.signature.topk == kTopk);
  CHECK(request.signature.indexBytes == 8);
  CHECK(request.signature.numExperts == kExperts);
  CHECK(request.signature.hasWeights == 1);
}

TEST_CASE("what may be left out, and zero tokens") {
  Arguments arguments;
  arguments.inputs.scales = arguments.inputs.topkIdx = arguments.inputs.topkWeights = {};
  const Signature signature = arguments.validate().signature;
  CHECK(signature.topk == -1);
  CHECK(signature.numScales == 0);
  Arguments none;
  none.inputs.x = makeView(nullptr, DataType::uint8, {0, 7});
  none.inputs.scales = {};
  none.inputs.topkIdx = makeView(nullptr, DataType::int32, {0, 9});
  none.inputs.topkWeights = makeView(nullptr, DataType::float32, {0, 9});
  none.inputs.isTokenInRank = makeView(nullptr, DataType::boolean, {0, kRanks});
  none.perRank = {0, 0};
  none.perExpert = {0, 0, 0, 0};
  none.inputs.numTokensPerRank.data = none.perRank.data();
  CHECK_NOTHROW(none.validate());
}

TEST_CASE("x of a dispatch") {
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.x = {}; }), {"x is missing", "[T, H]"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.x.ndim = 1; }),
            {"x is bfloat16[3] on cpu", "[any, any]", "[T, H]"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.x.shape[1] = 0; }),
            {"x is bfloat16[3, 0]", "H must be at least 1"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.x.strides[0] = 8; }),
            {"x is bfloat16[3, 4]", "contiguous"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.x.data = nullptr; }),
            {"x is bfloat16[3, 4]", "without memory"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.x.device = {DeviceType::cuda, 1}; }),
            {"x is bfloat16[3, 4] on cuda:1", "takes tensors on cpu"});
}

TEST_CASE("scales may have gaps, but only elements of 1, 2 or 4 bytes") {
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.scales.dtype = DataType::float64; }),
            {"the scales of x", "float64[3, 5]", "1, 2 or 4 bytes"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.scales.shape[0] = 2; }),
            {"the scales of x", "float32[2, 5]", "[3, any]", "[T, S]"});
  Arguments arguments;
  arguments.inputs.scales.strides = {1, 3};
  CHECK_NOTHROW(arguments.validate());
}

TEST_CASE("topk_idx and topk_weights") {
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.topkWeights = {}; }),
            {"topk_idx is int64[3, 2]", "topk_weights is none", "both or neither"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.topkIdx = {}; }),
            {"topk_idx is none", "topk_weights is float32[3, 2]", "both or neither"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.topkIdx.dtype = DataType::int16; }),
            {"topk_idx is int16[3, 2]", "int32, int64"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.topkIdx.shape[0] = 2; }),
            {"topk_idx is int64[2, 2]", "[3, any]", "[T, K]"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.topkWeights.shape[1] = 1; }),
            {"topk_weights is float32[3, 1]", "[3, 2]"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.topkWeights.dtype = DataType::float16; }),
            {"topk_weights is float16[3, 2]", "float32"});
}

TEST_CASE("an id out of range is named with its place") {
  checkSays(dispatchMessage([](Arguments& a) { a.ids[3] = kExperts; }),
            {"topk_idx[1, 1] is 4", "4 experts", "0 to 3", "-1 for none"});
  checkSays(dispatchMessage([](Arguments& a) { a.ids[4] = -2; }), {"topk_idx[2, 0] is -2"});
  checkSays(dispatchMessage([](Arguments& a) { a.ids[0] = std::int64_t{1} << 32; }),
            {"topk_idx[0, 0] is 4294967296"});
}

TEST_CASE("is_token_in_rank and the counts that go with it") {
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.isTokenInRank = {}; }),
            {"is_token_in_rank is missing", "[T, R]"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.isTokenInRank.shape[1] = 3; }),
            {"is_token_in_rank is bool[3, 3]", "[3, 2]"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.isTokenInRank.dtype = DataType::int32; }),
            {"is_token_in_rank is int32[3, 2]", "bool"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.numTokensPerRank.shape[0] = 1; }),
            {"num_tokens_per_rank is int32[1]", "[2]", "[R]"});
  checkSays(dispatchMessage([](Arguments& a) { a.perRank[1] = 2; }),
            {"num_tokens_per_rank[1] is 2", "sends 1 tokens to rank 1"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.numTokensPerExpert = {}; }),
            {"num_tokens_per_expert is missing", "[E]"});
  checkSays(dispatchMessage([](Arguments& a) { a.perExpert[2] = -1; }),
            {"num_tokens_per_expert[2] is -1", "not be negative"});
  checkSays(dispatchMessage([](Arguments& a) { a.inputs.numTokensPerExpert.shape[0] = 0; }),
            {"num_experts is 0", "at least 1"});
}

TEST_CASE("counts per expert are those of the choices that are sent") {
  CHECK(dispatchMessage([](Arguments&) {}) == "nothing was thrown");
  checkSays(dispatchMessage([](Arguments& a) { a.perExpert[3] = 2; }),
            {"num_tokens_per_expert[3] is 2", "send 0 choices to expert 3"});
  // A choice whose rank the token does not go to is not sent.
  checkSays(dispatchMessage([](Arguments& a) { a.ids[2] = 0; }), {"num_tokens_per_expert[2] is 1"});
  CHECK(dispatchMessage([](Arguments& a) {
          a.ids[2] = 0;
          a.perExpert[2] = 0;
        }) == "nothing was thrown");
  CHECK(dispatchMessage([](Arguments& a) {
          a.inputs.topkIdx = a.inputs.topkWeights = {};
          a.perExpert = {5, 6, 7, 8};
        }) == "nothing was thrown");
}

TEST_CASE("the options of a dispatch") {
  checkSays(dispatchMessage([](Arguments& a) { a.dispatchOptions.expertAlignment = 0; }),
            {"expert_alignment is 0", "1 to 2147483647"});
  checkSays(dispatchMessage([](Arguments& a) { a.dispatchOptions.numWorstTokens = -5; }),
            {"num_worst_tokens is -5", "0 (not given) to 2147483647"});
  checkSays(dispatchMessage([](Arguments& a) {
              a.dispatchOptions.numWorstTokens = 5;
              a.inputs.topkIdx = a.inputs.topkWeights = {};
            }),
            {"num_worst_tokens is 5", "needs topk_idx"});
}

TEST_CASE("the experts of a map are those of the call") {
  checkSays(dispatchMessage([](Arguments& a) { a.options.expertMap = {0, 1, 0}; }),
            {"num_experts is 4", "expert_map places 3"});
}

std::string optionsMessage(const std::function<void(BufferOptions&)>& change) {
  BufferOptions options;
  change(options);
  return messageOf([&] { validateOptions(options, kRanks); });
}

TEST_CASE("the options of a buffer") {
  CHECK_NOTHROW(validateOptions({}, kRanks));
  using Seconds = std::chrono::duration<double>;
  checkSays(optionsMessage([](BufferOptions& o) { o.timeout = Seconds(0); }),
            {"timeout is 0 s", "more than 0"});
  checkSays(optionsMessage([](BufferOptions& o) {
              o.timeout = Seconds(std::numeric_limits<double>::quiet_NaN());
            }),
            {"timeout is nan", "at most 1e+09"});
  checkSays(optionsMessage([](BufferOptions& o) { o.arenaBytes = -1; }),
            {"num_nvl_bytes is -1", "not be negative"});
  checkSays(optionsMessage([](BufferOptions& o) { o.maxArenaBytes = -2; }),
            {"max_arena_bytes is -2", "not be negative"});
  checkSays(optionsMessage([](BufferOptions& o) { o.numThreads = 2000; }),
            {"num_threads is 2000", "1024"});
  checkSays(optionsMessage([](BufferOptions& o) { o.ranksPerDomain = -1; }),
            {"ranks_per_domain is -1", "not be negative"});
  checkSays(optionsMessage([](BufferOptions& o) { o.expertMap = {0, 2}; }),
            {"expert_map[1] is 2", "a rank, 0 to 1"});
}

TEST_CASE("options that this version does not serve") {
  BufferOptions options;
  options.ranksPerDomain = 1;
  checkSays(messageOf<NotBuilt>([&] { validateOptions(options, kRanks); }),
            {"ranks_per_domain is 1", "2 ranks"});
}

TEST_CASE("a buffer on the CPU takes no stream") {
  const Arguments arguments;
  CHECK_NOTHROW(validateCall(arguments.facts, {}));
  CallOptions call;
  call.stream = Stream(static_cast<void*>(nullptr));
  checkSays(messageOf([&] { validateCall(arguments.facts, call); }), {"stream", "CPU"});
}

TEST_CASE("the arguments of get_dispatch_layout") {
  const Arguments a;
  const auto check = [&](std::int64_t experts, const std::function<void(LayoutOutputs&)>& change) {
    LayoutOutputs outputs{a.inputs.numTokensPerRank, a.inputs.numTokensPerExpert,
                          a.inputs.isTokenInRank};
    change(outputs);
    return messageOf([&] { validateLayout(a.facts, a.inputs.topkIdx, experts, outputs); });
  };
  CHECK(check(kExperts, [](LayoutOutputs&) {}) == "nothing was thrown");
  checkSays(check(0, [](LayoutOutputs&) {}), {"num_experts is 0", "at least 1"});
  checkSays(check(std::int64_t{1} << 31, [](LayoutOutputs&) {}), {"2147483648", "below 2^31"});
  checkSays(check(2, [](LayoutOutputs&) {}), {"topk_idx[1, 0] is 2", "0 to 1"});
  checkSays(check(kExperts, [](LayoutOutputs& o) { o.isTokenInRank.shape[0] = 1; }),
            {"is_token_in_rank is bool[1, 2]", "[3, 2]"});
  checkSays(check(kExperts, [](LayoutOutputs& o) { o.numTokensPerExpert = {}; }),
            {"num_tokens_per_expert is missing", "[E]"});
}

std::shared_ptr<HandleState> someHandle() {
  auto state = std::make_shared<HandleState>();
  state->bufferId = 77;
  state->epoch = 9;
  state->numTokens = kTokens;
  state->hidden = kHidden;
  state->topk = kTopk;
  state->numExperts = kExperts;
  state->numRows = 5;
  state->plan = std::make_shared<SendPlan>();
  return state;
}

TEST_CASE("a handle is one of this buffer's") {
  const Arguments a;
  DispatchInputs rows;
  rows.x = a.inputs.x;
  const auto message = [&](const DispatchHandle& handle) {
    return messageOf([&] { validateCachedDispatch(a.facts, rows, handle); });
  };
  CHECK(message(DispatchHandle(someHandle())) == "nothing was thrown");
  checkSays(message({}), {"handle is empty", "this buffer's dispatch"});
  const auto other = someHandle();
  other->bufferId = 78;
  checkSays(message(DispatchHandle(other)), {"another buffer"});
}

TEST_CASE("the arguments of a cached dispatch") {
  const Arguments a;
  const DispatchHandle handle(someHandle());
  const auto message = [&](const std::function<void(DispatchInputs&)>& change) {
    DispatchInputs rows;
    rows.x = a.inputs.x;
    change(rows);
    return messageOf([&] { validateCachedDispatch(a.facts, rows, handle); });
  };
  checkSays(message([&](DispatchInputs& rows) { rows.topkIdx = a.inputs.topkIdx; }),
            {"topk_idx is int64[3, 2]", "left out", "handle"});
  checkSays(message([&](DispatchInputs& rows) { rows.x.shape[0] = 2; }),
            {"x is bfloat16[2, 4]", "T = 3"});
  checkSays(message([&](DispatchInputs& rows) { rows.x.shape = {3, 2}, rows.x.strides[0] = 2; }),
            {"x is bfloat16[3, 2]", "H = 4"});
}

TEST_CASE("the outputs of a dispatch") {
  const Arguments a;
  PendingState pending;
  pending.request = a.validate();
  pending.numRows = 2;
  const auto message = [&](const std::function<void(DispatchOutputs&)>& change) {
    DispatchOutputs outputs{makeView(a.x.data(), DataType::bfloat16, {2, kHidden}),
                            makeView(a.scales.data(), DataType::float32, {2, 5}),
                            makeView(a.ids.data(), DataType::int64, {2, kTopk}),
                            makeView(a.weights.data(), DataType::float32, {2, kTopk})};
    change(outputs);
    return messageOf([&] { validateDispatchOutputs(pending, outputs); });
  };
  CHECK(message([](DispatchOutputs&) {}) == "nothing was thrown");
  checkSays(message([](DispatchOutputs& o) { o.x.shape[0] = 3; }),
            {"the output of x is bfloat16[3, 4]", "[2, 4]", "[N, H]"});
  checkSays(message([](DispatchOutputs& o) { o.x.dtype = DataType::float16; }),
            {"the output of x is float16[2, 4]", "bfloat16"});
  checkSays(message([](DispatchOutputs& o) { o.scales = {}; }),
            {"the output of the scales is missing", "[N, S]"});
  checkSays(message([](DispatchOutputs& o) { o.topkIdx.dtype = DataType::int32; }),
            {"the output of topk_idx is int32[2, 2]", "int64"});
  checkSays(message([](DispatchOutputs& o) { o.topkWeights = {}; }),
            {"the output of topk_weights is missing", "[N, K]"});
  pending.request.signature.topk = -1;
  checkSays(message([](DispatchOutputs&) {}),
            {"the output of topk_idx is int64[2, 2]", "left out", "no topk_idx is sent"});
}

struct CombineArguments {
  std::vector<float> bytes = std::vector<float>(64);
  TensorView rows = makeView(bytes.data(), DataType::float32, {5, kHidden});
  TensorView tokens = makeView(bytes.data(), DataType::float32, {kTokens, kHidden});
  CombineInputs inputs{rows, makeView(bytes.data(), DataType::float32, {5, kTopk}), tokens, tokens};
  CombineOutputs outputs{tokens, makeView(bytes.data(), DataType::float32, {kTokens, kTopk})};
};

std::string combineMessage(const std::function<void(CombineArguments&)>& change,
                           const std::shared_ptr<HandleState>& state = someHandle()) {
  const Arguments a;
  CombineArguments c;
  change(c);
  return messageOf([&] { validateCombine(a.facts, c.inputs, DispatchHandle(state), c.outputs); });
}

TEST_CASE("the arguments of a combine") {
  CHECK(combineMessage([](CombineArguments&) {}) == "nothing was thrown");
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.x.shape[0] = 4; }),
            {"x is float32[4, 4]", "[5, any]", "[N, H]"});
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.x.dtype = DataType::uint8; }),
            {"x is uint8[5, 4]", "bfloat16, float16, float32"});
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.x.shape[1] = 3; }),
            {"x is float32[5, 3]"});
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.bias0 = {}; }),
            {"second bias", "without the first"});
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.bias1.shape[0] = 9; }),
            {"bias is float32[9, 4]", "[3, 4]", "[T, H]"});
  checkSays(combineMessage([](CombineArguments& c) { c.outputs.x.shape[0] = 5; }),
            {"the output of x is float32[5, 4]", "[3, 4]"});
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.topkWeights.shape[1] = 1; }),
            {"topk_weights is float32[5, 1]", "[5, 2]"});
  checkSays(combineMessage([](CombineArguments& c) { c.inputs.topkWeights = {}; }),
            {"the output of topk_weights is float32[3, 2]", "left out"});
  checkSays(combineMessage([](CombineArguments& c) { c.outputs.topkWeights = {}; }),
            {"the output of topk_weights is missing", "[T, K]"});
}

TEST_CASE("the hidden size of a combine is that of its dispatch, unless that moved bytes") {
  const auto narrow = [](CombineArguments& c) {
    c.inputs.bias0 = c.inputs.bias1 = {};
    c.inputs.x = makeView(c.bytes.data(), DataType::float32, {5, 2});
    c.outputs.x = makeView(c.bytes.data(), DataType::float32, {kTokens, 2});
  };
  checkSays(combineMessage(narrow), {"x is float32[5, 2]", "H = 4"});
  const auto opaque = someHandle();
  opaque->opaqueRows = true;
  CHECK(combineMessage(narrow, opaque) == "nothing was thrown");
}

}  // namespace
}  // namespace mscclpp_ep
