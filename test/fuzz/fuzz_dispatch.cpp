// SPDX-License-Identifier: MIT
// A dispatch, a cached one and a combine with a peer whose messages and progress are damaged.
#include "core/validate.hpp"
#include "cpu/combine.hpp"
#include "cpu/dispatch.hpp"
#include "host/rounds.hpp"
#include "support/fake_peer.hpp"

namespace mscclpp_ep::fuzz {
namespace {

constexpr Lane kLane = Lane::highThroughput;
constexpr std::int64_t kExperts = 4;
constexpr std::int64_t kMostRows = 1 << 12;
constexpr std::size_t kColumnBytes = 2 * kPage;

/// An array of exactly as many bytes as it has, in the arena or outside it.
struct Array {
  Array() = default;
  Array(Arena* arena, DataType dtype, std::initializer_list<std::int64_t> shape) {
    view = makeView(nullptr, dtype, shape);
    if (arena != nullptr) {
      if (auto block = arena->allocate(numBytes(view))) owner = block->data;
    }
    if (owner == nullptr) owner = std::shared_ptr<void>(::operator new(numBytes(view)), free);
    std::memset(owner.get(), 1, numBytes(view));
    view.data = owner.get();
  }
  static void free(void* data) { ::operator delete(data); }

  TensorView view;
  std::shared_ptr<void> owner;
};

class Operation {
 public:
  explicit Operation(Input& input)
      : input_(input),
        tokens_(input.upTo(9)),
        hidden_(1 + input.upTo(40)),
        topk_(input.upTo(3)),
        scales_(input.upTo(2)),
        dtype_(input.flag() ? DataType::bfloat16 : DataType::float32),
        inArena_(input.flag()),
        arena_(peer_, 0, std::size_t{1} << 18) {
    const std::int64_t worst = topk_ > 0 ? input.upTo(40) : 0;
    options_.numWorstTokens = worst > 20 ? worst : 0;
    makeInputs();
  }

  void run() {
    const DispatchHandle handle = dispatch(validateDispatch(facts_, inputs_, options_));
    if (!handle) return;
    if (input_.flag()) {
      DispatchInputs again;
      again.x = x_.view;
      DispatchRequest cached = validateCachedDispatch(facts_, again, handle);
      if (!dispatch(std::move(cached))) return;
    }
    combine(handle);
  }

 private:
  void makeInputs() {
    x_ = Array(nullptr, dtype_, {tokens_, hidden_});
    inRank_ = Array(nullptr, DataType::boolean, {tokens_, 2});
    perRank_ = Array(nullptr, DataType::int32, {2});
    perExpert_ = Array(nullptr, DataType::int32, {kExperts});
    auto* marks = static_cast<std::uint8_t*>(inRank_.owner.get());
    auto* counts = static_cast<std::int32_t*>(perRank_.owner.get());
    const auto which = input_.take<std::uint16_t>();
    std::fill_n(counts, 2, 0);
    for (std::int64_t i = 0; i < 2 * tokens_; ++i) {
      marks[i] = (which >> (i % 16) & 1) != 0 ? 1 : 0;
      counts[i % 2] += marks[i];
    }
    inputs_ = {x_.view, {}, {}, {}, inRank_.view, perRank_.view, perExpert_.view};
    if (scales_ > 0) {
      scaleRows_ = Array(nullptr, DataType::float32, {tokens_, scales_});
      inputs_.scales = scaleRows_.view;
    }
    if (topk_ == 0) return;
    ids_ = Array(nullptr, DataType::int64, {tokens_, topk_});
    weights_ = Array(nullptr, DataType::float32, {tokens_, topk_});
    auto* ids = static_cast<std::int64_t*>(ids_.owner.get());
    for (std::int64_t i = 0; i < tokens_ * topk_; ++i) ids[i] = (which >> i % 13) % kExperts;
    inputs_.topkIdx = ids_.view;
    inputs_.topkWeights = weights_.view;
  }

  void damageAndPost(Round round, Bytes message) {
    input_.damage(message);
    peer_.post(kLane, context_.epoch, static_cast<std::uint32_t>(round), message);
  }

  void raise(Progress which, std::uint32_t expected) {
    const auto value = input_.flag() ? expected : static_cast<std::uint32_t>(input_.number());
    peer_.raise(kLane, which, value, context_.epoch);
  }

  void postEntry(const DispatchRequest& request) {
    DispatchEntry entry;
    entry.signature = request.signature;
    entry.numRows = rowsComing_;
    const std::vector<std::int32_t> counts(request.cached == nullptr ? kExperts / 2 : 0, 2);
    entry.numCounts = static_cast<std::int64_t>(counts.size());
    damageAndPost(Round::entry, encode(entry, counts));
  }

  void postPublication() {
    DispatchPublish publication;
    publication.capacity = kMostOfPeer;
    publication.firstRow = input_.upTo(20);
    publication.ringRows = 1 + input_.upTo(7);
    const bool lands = input_.flag();
    for (std::size_t column = 0; column < kNumColumns; ++column) {
      publication.columns[column] = {lands ? Access::landing : Access::straight, kPeerSegment,
                                     column * kColumnBytes};
    }
    damageAndPost(Round::publish, bytesOf(publication));
  }

  DispatchHandle dispatch(DispatchRequest request) {
    ++context_.epoch;
    peer_.forgetSteps();
    if (request.cached == nullptr) {
      rowsComing_ = input_.upTo(12);
      request.placement = std::make_shared<ExpertPlacement>(kExperts, 2, std::vector<int>{});
      request.routing = readRouting(inputs_, *request.placement);
    } else {
      request.placement = placement_;
    }
    placement_ = request.placement;
    peer_.then([&] { postEntry(request); });
    DispatchPlan plan = exchangeCounts(context_, request);
    must(plan.numRows >= 0 && plan.numRecv >= 0, "no count of rows is negative");
    for (const std::int64_t count : plan.perExpert) must(count >= 0, "nor one of an expert");
    if (plan.numRows > kMostRows) {
      abandonRows(context_, Verdict::noRoom, "more rows than this harness has room for");
      return DispatchHandle(nullptr);
    }
    const DispatchOutputs outputs = makeOutputs(plan.numRows, request);
    peer_.then([&] { postPublication(); });
    for (int i = 0; i < 4; ++i) {
      peer_.then([&] { raise(kRowsTaken, kTakenAll); });
      peer_.then([&, i] {
        const std::int64_t pushed = i < 2 ? std::min<std::int64_t>(rowsComing_, 3) : rowsComing_;
        raise(kRowsPushed, static_cast<std::uint32_t>(std::min(pushed, plan.numRows) + 1));
      });
    }
    return DispatchHandle(cpu::moveRows(context_, request, plan, outputs));
  }

  DispatchOutputs makeOutputs(std::int64_t rows, const DispatchRequest& request) {
    Arena* arena = inArena_ ? &arena_ : nullptr;
    outX_ = Array(arena, dtype_, {rows, hidden_});
    DispatchOutputs outputs{outX_.view, {}, {}, {}};
    if (request.inputs.scales) {
      outScales_ = Array(arena, DataType::float32, {rows, scales_});
      outputs.scales = outScales_.view;
    }
    if (request.inputs.topkIdx) {
      outIds_ = Array(arena, DataType::int64, {rows, topk_});
      outWeights_ = Array(arena, DataType::float32, {rows, topk_});
      outputs.topkIdx = outIds_.view;
      outputs.topkWeights = outWeights_.view;
    }
    return outputs;
  }

  void combine(const DispatchHandle& handle) {
    ++context_.epoch;
    peer_.forgetSteps();
    const Array out(nullptr, dtype_, {tokens_, hidden_});
    const Array outWeights(nullptr, DataType::float32, {tokens_, std::max<std::int64_t>(topk_, 1)});
    CombineInputs inputs{outX_.view, {}, {}, {}};
    CombineOutputs outputs{out.view, {}};
    if (topk_ > 0 && outWeights_.view && outWeights_.view.shape[0] == outX_.view.shape[0]) {
      inputs.topkWeights = outWeights_.view;
      outputs.topkWeights = outWeights.view;
    }
    const CombineRequest request = validateCombine(facts_, inputs, handle, outputs);
    peer_.then([&] { postOffer(request); });
    for (int i = 0; i < 3; ++i) peer_.then([&] { raise(kRowsStaged, kTakenAll); });
    peer_.then([&] { raise(kRowsRead, 1); });
    peer_.then([&] { raise(kRowsRead, 1); });
    cpu::combineRows(context_, request);
  }

  void postOffer(const CombineRequest& request) {
    CombineEntry entry;
    entry.signature = request.signature;
    entry.rows = {input_.flag() ? Access::staged : Access::straight, kPeerSegment, 0};
    entry.weights = {Access::straight, kPeerSegment, 3 * kColumnBytes};
    damageAndPost(Round::entry, bytesOf(entry));
  }

  static constexpr std::int64_t kMostOfPeer = 32;
  static constexpr std::uint32_t kTakenAll = 100;

  Input& input_;
  const std::int64_t tokens_, hidden_, topk_, scales_;
  const DataType dtype_;
  const bool inArena_;
  BufferOptions bufferOptions_;
  const BufferFacts facts_{0, 2, 0, bufferOptions_};
  FakePeer peer_;
  Mailbox mailbox_{peer_, kLane, 1};
  Arena arena_;
  cpu::HostPool pool_;
  cpu::Workers workers_{1};
  BufferStats stats_;
  Trace trace_;
  cpu::Context context_{{peer_, mailbox_, arena_, stats_, trace_},
                        {pool_, workers_, cpu::rowKernels()}};
  DispatchOptions options_;
  DispatchInputs inputs_;
  std::shared_ptr<const ExpertPlacement> placement_;
  std::int64_t rowsComing_ = 0;
  Array x_, inRank_, perRank_, perExpert_, scaleRows_, ids_, weights_;
  Array outX_, outScales_, outIds_, outWeights_;
};

}  // namespace
}  // namespace mscclpp_ep::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep::fuzz;
  Input input(data, size);
  endsTyped([&] { Operation(input).run(); });
  return 0;
}
