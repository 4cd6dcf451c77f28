// SPDX-License-Identifier: MIT
// A low-latency dispatch and combine with a peer whose messages, tokens and progress are damaged.
#include "core/validate.hpp"
#include "core/validate_low_latency.hpp"
#include "cpu/low_latency.hpp"
#include "support/fake_peer.hpp"

namespace mscclpp_ep::fuzz {
namespace {

constexpr Lane kLane = Lane::lowLatency1;
constexpr std::int64_t kExperts = 4;
constexpr std::int64_t kLocal = 2;
constexpr std::size_t kArrayBytes = 4 * kPage;

/// An array of exactly as many bytes as it has.
struct Array {
  Array() = default;
  Array(DataType dtype, std::initializer_list<std::int64_t> shape)
      : view(makeView(nullptr, dtype, shape)),
        bytes(std::make_unique<std::byte[]>(numBytes(view))) {
    view.data = bytes.get();
  }

  TensorView view;
  std::unique_ptr<std::byte[]> bytes;
};

class Operation {
 public:
  explicit Operation(Input& input)
      : input_(input),
        most_(1 + input.upTo(7)),
        tokens_(input.upTo(most_)),
        hidden_(1 + input.upTo(200)),
        topk_(1 + input.upTo(3)),
        quantization_(static_cast<Quantization>(input.upTo(3))),
        weightsFirst_(input.flag()) {
    x_ = Array(DataType::bfloat16, {tokens_, hidden_});
    ids_ = Array(DataType::int32, {tokens_, topk_});
    weights_ = Array(DataType::float32, {tokens_, topk_});
    const auto which = input.take<std::uint16_t>();
    auto* ids = static_cast<std::int32_t*>(ids_.view.data);
    for (std::int64_t i = 0; i < tokens_ * topk_; ++i) {
      ids[i] = static_cast<std::int32_t>((which >> i % 13) % (kExperts + 1)) - 1;
    }
  }

  void run() {
    const LowLatencyHandle handle = dispatch();
    combine(handle);
  }

 private:
  void damageAndPost(Bytes message) {
    input_.damage(message);
    peer_.post(kLane, lane_.context.epoch, static_cast<std::uint32_t>(Round::entry), message);
  }
  void raise(Progress which) {
    const auto value = input_.upTo(3) > 0 ? 1 : static_cast<std::uint32_t>(input_.number());
    peer_.raise(kLane, which, value, lane_.context.epoch);
  }

  LowLatencyDispatchOutputs makeOutputs() {
    const std::int64_t slots = 2 * most_;
    const bool plain = quantization_ == Quantization::none;
    outX_ = Array(plain ? DataType::bfloat16 : DataType::float8E4m3, {kLocal, slots, hidden_});
    counts_ = Array(DataType::int32, {kLocal});
    sources_ = Array(DataType::int32, {kLocal, slots});
    ranges_ = Array(DataType::int64, {kLocal, 2});
    waits_ = Array(DataType::int64, {2});
    const std::int64_t scales = (hidden_ + 127) / 128;
    const bool packed = quantization_ == Quantization::float8Ue8m0;
    if (!plain) {
      scales_ = Array(packed ? DataType::int32 : DataType::float32,
                      {kLocal, slots, packed ? (scales + 3) / 4 : scales});
    }
    return {outX_.view, scales_.view, counts_.view, sources_.view, ranges_.view, {}, waits_.view};
  }

  void postTokens(const LowLatencyDispatchRequest& request) {
    LowLatencyDispatchEntry entry;
    entry.signature = request.signature;
    entry.numTokens = input_.upTo(most_);
    const auto at = [](std::size_t index) {
      return ArrayAddress{Access::straight, kPeerSegment, index * kArrayBytes};
    };
    entry.rows = at(0);
    entry.scales = at(1);
    entry.topkIdx = at(2);
    entry.weights = at(3);
    auto* ids = reinterpret_cast<std::int32_t*>(peer_.memory() + 2 * kArrayBytes);
    for (std::int64_t i = 0; i < entry.numTokens * topk_; ++i) {
      const std::int64_t id = input_.upTo(40);
      ids[i] = id < 40 ? static_cast<std::int32_t>(id % (kExperts + 1)) - 1
                       : static_cast<std::int32_t>(input_.number());
    }
    damageAndPost(bytesOf(entry));
  }

  LowLatencyHandle dispatch() {
    lane_.context.epoch = 1;
    LowLatencyDispatchInputs inputs{x_.view, ids_.view, {}};
    if (weightsFirst_) inputs.topkWeights = weights_.view;
    LowLatencyDispatchRequest request =
        validateLowLatencyDispatch(facts_, inputs, {most_, kExperts, quantization_}, makeOutputs());
    request.placement = std::make_shared<ExpertPlacement>(kExperts, 2, std::vector<std::int32_t>{});
    peer_.then([this, request] { postTokens(request); });
    const auto sent = sendLowLatencyDispatch(lane_, std::move(request));
    sent->receive();
    for (int e = 0; e < kLocal; ++e) {
      const auto count = static_cast<const std::int32_t*>(counts_.view.data)[e];
      must(count >= 0 && count <= 2 * most_, "an expert gets what it has room for");
    }
    lane_.raiseRead();
    return LowLatencyHandle(sent->handle);
  }

  void combine(const LowLatencyHandle& handle) {
    peer_.then([this] { raise(kRowsRead); });
    lane_.awaitReaders();
    lane_.context.epoch = 3;
    const Array rows(DataType::bfloat16, {kLocal, 2 * most_, hidden_});
    const Array out(DataType::bfloat16, {tokens_, hidden_});
    LowLatencyCombineOptions options;
    options.exact = input_.flag();
    LowLatencyCombineRequest request = validateLowLatencyCombine(
        facts_, {rows.view, ids_.view, weights_.view}, handle, options, {out.view, {}});
    peer_.then([this, signature = request.signature] {
      LowLatencyCombineEntry entry;
      entry.signature = signature;
      entry.rows = {Access::straight, kPeerSegment, 0};
      entry.weights = {Access::straight, kPeerSegment, 3 * kArrayBytes};
      damageAndPost(bytesOf(entry));
    });
    for (int i = 0; i < 2; ++i) peer_.then([this] { raise(kRowsStaged); });
    sendLowLatencyCombine(lane_, std::move(request))->receive();
  }

  Input& input_;
  const std::int64_t most_, tokens_, hidden_, topk_;
  const Quantization quantization_;
  const bool weightsFirst_;
  BufferOptions bufferOptions_;
  const BufferFacts facts_{0, 2, 0, bufferOptions_};
  FakePeer peer_;
  Mailbox mailbox_{peer_, Lane::highThroughput, 1};
  Arena arena_{peer_, 0, 0};
  cpu::HostPool pool_;
  cpu::Workers workers_{1};
  BufferStats stats_;
  Trace trace_;
  const cpu::Context parts_{{peer_, mailbox_, arena_, stats_, trace_},
                            {pool_, workers_, cpu::rowKernels()}};
  cpu::LowLatencyLane lane_{parts_, kLane, 1};
  Array x_, ids_, weights_;
  Array outX_, scales_, counts_, sources_, ranges_, waits_;
};

}  // namespace
}  // namespace mscclpp_ep::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep::fuzz;
  Input input(data, size);
  endsTyped([&] { Operation(input).run(); });
  return 0;
}
