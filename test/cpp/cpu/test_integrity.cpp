// SPDX-License-Identifier: MIT
// The integrity mode, with a transport that damages what travels.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "core/validate.hpp"
#include "core/validate_low_latency.hpp"
#include "cpu/combine.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/low_latency.hpp"
#include "support/ranks.hpp"
#include "transport/shared_memory.hpp"

namespace mscclpp_ep::cpu {
namespace {

using testing::contains;
using testing::require;

constexpr int kRanks = 2;
constexpr std::int64_t kTokens = 5;
constexpr std::int64_t kVictim = 3;  ///< the token of which something is damaged
constexpr std::int64_t kHidden = 128;
constexpr std::int64_t kTopk = 2;  ///< every token chooses both ranks' only expert
constexpr std::size_t kRowBytes = kHidden * 2;
constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::uint64_t kBufferId = 7;

using Bytes = std::vector<std::byte>;

template <typename T>
Bytes bytesOf(const T& value) {
  Bytes bytes(sizeof(value));
  std::memcpy(bytes.data(), &value, sizeof(value));
  return bytes;
}

/// Where `pattern` is in `memory`, or null. Looks at memory that peers write to, without their
/// leave, which is a race by design.
__attribute__((no_sanitize("thread"))) std::byte* findIn(std::span<std::byte> memory,
                                                         const Bytes& pattern) {
  if (memory.size() < pattern.size()) return nullptr;
  for (std::size_t at = 0; at <= memory.size() - pattern.size(); ++at) {
    std::size_t same = 0;
    while (same < pattern.size() && memory.data()[at + same] == pattern.data()[same]) ++same;
    if (same == pattern.size()) return memory.data() + at;
  }
  return nullptr;
}

/// Damages the first copy of a pattern in the memory that this rank shares, or writes to, between
/// the moment that it has been written and that in which a peer is told.
class Faulty final : public Transport {
 public:
  explicit Faulty(Bootstrap& bootstrap) : inner_(bootstrap, options()) {}

  void damage(const Bytes& pattern) {
    pattern_ = pattern;
    peers_.clear();  // what was written to in operations before may hold anything by now
  }
  bool damaged() const { return damaged_; }

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  int ranksOnHost() const override { return inner_.ranksOnHost(); }
  std::byte* control(int peer) const override {
    if (peer != rank()) tamper();
    return inner_.control(peer);
  }
  std::shared_ptr<const void> controlOwner(int peer) const override {
    return inner_.controlOwner(peer);
  }
  void ring(int peer) override { inner_.ring(peer); }
  std::int64_t shareableBytes() const override { return inner_.shareableBytes(); }
  SharedBlock share(std::size_t bytes) override {
    SharedBlock block = inner_.share(bytes);
    own_.emplace_back(block.data, block.bytes);
    return block;
  }
  void unshare(std::uint32_t id) override { inner_.unshare(id); }
  std::byte* peerMemory(int peer, std::uint32_t id, std::uint64_t offset,
                        std::size_t bytes) override {
    std::byte* data = inner_.peerMemory(peer, id, offset, bytes);
    peers_.emplace_back(data, bytes);
    return data;
  }
  void enterCall(std::uint32_t mode) override { inner_.enterCall(mode); }
  void beginOperation(const char* name, std::uint64_t epoch) override {
    inner_.beginOperation(name, epoch);
  }
  bool masked(int peer) const override { return inner_.masked(peer); }
  void setMask(int peer, bool masked) override { inner_.setMask(peer, masked); }
  bool mayStillWrite(int peer) const override { return inner_.mayStillWrite(peer); }
  void requireNobodyGaveUp() override { inner_.requireNobodyGaveUp(); }
  void giveUp() noexcept override { inner_.giveUp(); }
  void leave() override { inner_.leave(); }

 protected:
  void waitAsleep(const std::function<bool()>& ready,
                  const std::function<Awaited()>& missing) override {
    inner_.wait(ready, missing);
  }

 private:
  static SharedMemoryOptions options() {
    SharedMemoryOptions options;
    options.connect.timeout = testing::kLongTimeout;
    return options;
  }
  __attribute__((no_sanitize("thread"))) void tamper() const {
    if (pattern_.empty() || damaged_) return;
    // Peers' memory first: a copy here may be one that stays on this rank.
    for (const auto* regions : {&peers_, &own_}) {
      for (const std::span<std::byte> memory : *regions) {
        std::byte* found = findIn(memory, pattern_);
        if (found == nullptr) continue;
        *found ^= std::byte{0x10};
        damaged_ = true;
        return;
      }
    }
  }

  SharedMemory inner_;
  std::vector<std::span<std::byte>> own_;
  std::vector<std::span<std::byte>> peers_;
  Bytes pattern_;
  mutable bool damaged_ = false;
};

/// An array in the arena, or elsewhere.
struct Array {
  std::shared_ptr<void> owner;
  TensorView view;
};

std::byte dispatchedByte(int rank, std::int64_t token) {
  return static_cast<std::byte>(0x20 * (rank + 1) + token);
}
std::byte combinedByte(std::int64_t row) { return static_cast<std::byte>(0x31 + row); }

/// A rank with the parts that a buffer has, and every operation of it.
class Rank {
 public:
  Rank(Bootstrap& bootstrap, bool integrity)
      : transport(bootstrap),
        context{{transport, mailbox_, arena_, stats_, trace_, kBufferId, 0, Lane::highThroughput,
                 false, integrity},
                {pool_, workers_, rowKernels()}} {
    for (std::int64_t t = 0; t < kTokens; ++t) {
      std::fill_n(x_.begin() + t * static_cast<std::int64_t>(kRowBytes), kRowBytes,
                  dispatchedByte(bootstrap.rank(), t));
      for (std::int64_t k = 0; k < kTopk; ++k) {
        ids_.push_back(k);
        weights_.push_back(weight(t, k));
      }
    }
  }

  /// No two are alike, and each is a power of two.
  float weight(std::int64_t token, std::int64_t k) const {
    return std::ldexp(1.0F, static_cast<int>(20 * transport.rank() + token * kTopk + k) - 9);
  }

  Array array(bool inArena, DataType dtype, std::initializer_list<std::int64_t> shape) {
    Array made{nullptr, makeView(nullptr, dtype, shape)};
    const std::size_t bytes = numBytes(made.view);
    if (inArena) {
      made.owner = arena_.allocate(bytes).value().data;
    } else {
      made.owner = std::shared_ptr<std::byte[]>(new std::byte[bytes]);
    }
    made.view.data = made.owner.get();
    std::memset(made.view.data, 0, bytes);
    return made;
  }

  void begin(Context& of) {
    of.epoch = ++epoch_;
    transport.beginOperation("an operation", of.epoch);
  }
  std::uint64_t nextEpoch() const { return epoch_ + 1; }

  DispatchHandle dispatch(bool inArena, const DispatchHandle& cached = {},
                          std::int64_t worstTokens = 0) {
    begin(context);
    DispatchInputs inputs;
    inputs.x = makeView(x_.data(), DataType::bfloat16, {kTokens, kHidden});
    if (!cached) addRouting(inputs);
    DispatchOptions how;
    how.numWorstTokens = worstTokens;
    DispatchRequest request = cached ? validateCachedDispatch(facts(), inputs, cached)
                                     : validateDispatch(facts(), inputs, how);
    request.placement = placement_;
    if (request.cached == nullptr) request.routing = readRouting(inputs, *placement_);
    const DispatchPlan plan = exchangeCounts(context, request);
    const Array x = array(inArena, DataType::bfloat16, {plan.numRows, kHidden});
    DispatchOutputs outputs;
    outputs.x = x.view;
    Array ids, weights;
    if (!cached) {
      ids = array(inArena, DataType::int64, {plan.numRows, kTopk});
      weights = array(inArena, DataType::float32, {plan.numRows, kTopk});
      outputs.topkIdx = ids.view;
      outputs.topkWeights = weights.view;
    }
    DispatchHandle handle(moveRows(context, request, plan, outputs));
    const auto* rows = static_cast<const std::byte*>(x.view.data);
    for (std::int64_t row = 0; row < std::min(plan.numRows, plan.numRecv); ++row) {
      require(rows[static_cast<std::size_t>(row) * kRowBytes + 5] ==
                  dispatchedByte(static_cast<int>(row / kTokens), row % kTokens),
              "row ", row, " of the dispatch");
    }
    return handle;
  }

  void combine(bool inArena, const DispatchHandle& handle) {
    begin(context);
    const std::int64_t rows = handle.state()->numRows;
    const Array x = expertRows(array(inArena, DataType::bfloat16, {rows, kHidden}), rows);
    const Array weights = array(inArena, DataType::float32, {rows, kTopk});
    std::fill_n(static_cast<float*>(weights.view.data), rows * kTopk, 3.25F);
    const Array out = array(false, DataType::bfloat16, {kTokens, kHidden});
    const Array outWeights = array(false, DataType::float32, {kTokens, kTopk});
    combineRows(context, validateCombine(facts(), {x.view, weights.view, {}, {}}, handle,
                                         {out.view, outWeights.view}));
    require(*static_cast<float*>(outWeights.view.data) == 6.5F, "the sum of the weights");
  }

  LowLatencyHandle lowLatencyDispatch(Quantization quantization, bool withWeights) {
    LowLatencyLane& lane = lanes_[0];
    begin(lane.context);
    lane.awaitReaders();
    LowLatencyDispatchInputs inputs{makeView(x_.data(), DataType::bfloat16, {kTokens, kHidden}),
                                    makeView(ids_.data(), DataType::int64, {kTokens, kTopk}),
                                    {}};
    if (withWeights) {
      inputs.topkWeights = makeView(weights_.data(), DataType::float32, {kTokens, kTopk});
    }
    const bool quantized = quantization != Quantization::none;
    const std::int64_t slots = kRanks * kTokens;
    const Array x =
        array(false, quantized ? DataType::float8E4m3 : DataType::bfloat16, {1, slots, kHidden});
    const Array count = array(false, DataType::int32, {1});
    const Array source = array(false, DataType::int32, {1, slots});
    const Array range = array(false, DataType::int64, {1, kRanks});
    const Array scales = array(false, DataType::float32, {1, slots, 1});
    LowLatencyDispatchOutputs outputs{x.view, {}, count.view, source.view, range.view, {}, {}};
    if (quantized) outputs.scales = scales.view;
    LowLatencyDispatchRequest request =
        validateLowLatencyDispatch(facts(), inputs, {kTokens, kRanks, quantization}, outputs);
    request.placement = placement_;
    const auto sent = sendLowLatencyDispatch(lane, std::move(request));
    sent->receive();
    lane.raiseRead();
    require(*static_cast<const std::int32_t*>(count.view.data) == slots, "the count");
    return LowLatencyHandle(sent->handle);
  }

  void lowLatencyCombine(const LowLatencyHandle& handle, bool exact) {
    LowLatencyLane& lane = lanes_[1];
    begin(lane.context);
    lane.awaitReaders();
    const std::int64_t slots = kRanks * kTokens;
    const Array x = expertRows(array(false, DataType::bfloat16, {1, slots, kHidden}), slots);
    const Array out = array(false, DataType::bfloat16, {kTokens, kHidden});
    const auto sent = sendLowLatencyCombine(
        lane,
        validateLowLatencyCombine(facts(),
                                  {x.view, makeView(ids_.data(), DataType::int64, {kTokens, kTopk}),
                                   makeView(weights_.data(), DataType::float32, {kTokens, kTopk})},
                                  handle, {exact, false}, {out.view, {}}));
    sent->receive();
    lane.raiseRead();
  }

  Faulty transport;

 private:
  BufferFacts facts() const { return {transport.rank(), kRanks, kBufferId, options_}; }

  void addRouting(DispatchInputs& inputs) {
    inputs.topkIdx = makeView(ids_.data(), DataType::int64, {kTokens, kTopk});
    inputs.topkWeights = makeView(weights_.data(), DataType::float32, {kTokens, kTopk});
    inputs.isTokenInRank = makeView(inRank_.data(), DataType::boolean, {kTokens, kRanks});
    inputs.numTokensPerRank = makeView(perRank_.data(), DataType::int32, {kRanks});
    inputs.numTokensPerExpert = makeView(perRank_.data(), DataType::int32, {kRanks});
  }

  static Array expertRows(Array rows, std::int64_t count) {
    for (std::int64_t row = 0; row < count; ++row) {
      std::memset(static_cast<std::byte*>(rows.view.data) + row * std::int64_t{kRowBytes},
                  static_cast<int>(combinedByte(row)), kRowBytes);
    }
    return rows;
  }

  BufferOptions options_;
  Mailbox mailbox_{transport, Lane::highThroughput, 1};
  Arena arena_{transport, kMiB / 4, 8 * kMiB};
  HostPool pool_;
  Workers workers_{1};
  BufferStats stats_;
  Trace trace_;
  std::uint64_t epoch_ = 0;
  Bytes x_ = Bytes(kTokens * kRowBytes);
  std::vector<std::int64_t> ids_;
  std::vector<float> weights_;
  std::vector<std::uint8_t> inRank_ = std::vector<std::uint8_t>(kTokens * kRanks, 1);
  std::vector<std::int32_t> perRank_ = std::vector<std::int32_t>(kRanks, kTokens);
  std::shared_ptr<const ExpertPlacement> placement_ =
      std::make_shared<ExpertPlacement>(kRanks, kRanks, std::span<const std::int32_t>());

 public:
  Context context;

 private:
  LowLatencyLane lanes_[2] = {{context, Lane::lowLatency0, 1}, {context, Lane::lowLatency1, 1}};
};

/// Something that travels in an operation from rank 1 for token kVictim.
struct Target {
  const char* name;
  std::function<Bytes(const Rank&)> pattern;
  const char* said;
};

const Target kTag{"the tag",
                  [](const Rank& rank) { return bytesOf(packTag(1, kVictim, rank.nextEpoch())); },
                  "its tag"};
const Target kWeight{"a weight", [](const Rank& rank) { return bytesOf(rank.weight(kVictim, 0)); },
                     "its checksum"};
const Target kDispatchedRow{
    "the row", [](const Rank&) { return Bytes(kRowBytes, dispatchedByte(1, kVictim)); },
    "its checksum"};
const Target kCombinedRow{
    "the row", [](const Rank&) { return Bytes(kRowBytes, combinedByte(kVictim)); }, "its checksum"};

/// What follows `prepare` is damaged on its way from rank 1, and rank 0 says so.
template <typename Prepare, typename Operate>
void damageOnTheWay(const Target& target, const Prepare& prepare, const Operate& operate) {
  CAPTURE(std::string(target.name));
  CHECK_NOTHROW(testing::runAsThreads(kRanks, [&](Bootstrap& bootstrap) {
    Rank rank(bootstrap, true);
    const auto handle = prepare(rank);
    const std::uint64_t epoch = rank.nextEpoch();
    bootstrap.barrier();
    if (rank.transport.rank() == 1) {
      rank.transport.damage(target.pattern(rank));
      try {
        operate(rank, handle);
      } catch (const PeerFailure&) {
        // Rank 0 has given up before this rank was done.
      }
      require(rank.transport.damaged(), "nothing was damaged");
    } else {
      const std::string text =
          testing::errorOf<PeerFailure>([&] { operate(rank, handle); }, "the damaged operation");
      rank.transport.giveUp();
      for (const std::string& part :
           {cat("(epoch ", epoch, ") on rank 0"), cat("what rank 1 sent for token ", kVictim, ":"),
            std::string(target.said)}) {
        require(contains(text, part), "'", text, "' does not say '", part, "'");
      }
    }
    bootstrap.barrier();
  }));
}

constexpr auto kNothing = [](Rank&) { return 0; };

TEST_CASE("damage on the way to a dispatch is named") {
  for (const bool inArena : {true, false}) {
    for (const std::int64_t worst : {std::int64_t{0}, std::int64_t{9}, std::int64_t{30}}) {
      CAPTURE(inArena);
      CAPTURE(worst);
      for (const Target& target : {kDispatchedRow, kTag, kWeight}) {
        damageOnTheWay(target, kNothing,
                       [&](Rank& rank, int) { rank.dispatch(inArena, {}, worst); });
      }
    }
  }
}

TEST_CASE("damage on the way to a cached dispatch is named") {
  for (const bool inArena : {true, false}) {
    CAPTURE(inArena);
    damageOnTheWay(
        kTag, [](Rank& rank) { return rank.dispatch(true); },
        [&](Rank& rank, const DispatchHandle& handle) { rank.dispatch(inArena, handle); });
  }
}

TEST_CASE("damage on the way to a combine is named") {
  for (const bool inArena : {true, false}) {
    CAPTURE(inArena);
    for (const Target& target : {kCombinedRow, kTag}) {
      damageOnTheWay(
          target, [](Rank& rank) { return rank.dispatch(true); },
          [&](Rank& rank, const DispatchHandle& handle) { rank.combine(inArena, handle); });
    }
  }
}

TEST_CASE("damage on the way to a low-latency dispatch is named") {
  for (const auto quantization : {Quantization::none, Quantization::float8}) {
    for (const Target& target : {kDispatchedRow, kTag, kWeight}) {
      if (quantization != Quantization::none && target.name == kDispatchedRow.name) continue;
      CAPTURE(static_cast<int>(quantization));
      damageOnTheWay(target, kNothing,
                     [&](Rank& rank, int) { rank.lowLatencyDispatch(quantization, true); });
    }
  }
}

TEST_CASE("damage on the way to a low-latency combine is named") {
  for (const bool exact : {true, false}) {
    for (const bool withWeights : {true, false}) {
      CAPTURE(exact);
      CAPTURE(withWeights);
      std::vector<Target> targets{kTag};
      if (exact) targets.push_back(kCombinedRow);              // else the rows are weighted sums
      if (!exact && !withWeights) targets.push_back(kWeight);  // else they do not travel
      for (const Target& target : targets) {
        damageOnTheWay(
            target,
            [&](Rank& rank) { return rank.lowLatencyDispatch(Quantization::none, withWeights); },
            [&](Rank& rank, const LowLatencyHandle& handle) {
              rank.lowLatencyCombine(handle, exact);
            });
      }
    }
  }
}

TEST_CASE("without damage nothing is said, and without the mode damage is not seen") {
  for (const bool integrity : {true, false}) {
    CAPTURE(integrity);
    CHECK_NOTHROW(testing::runAsThreads(kRanks, [&](Bootstrap& bootstrap) {
      Rank rank(bootstrap, integrity);
      if (!integrity && rank.transport.rank() == 1) rank.transport.damage(kWeight.pattern(rank));
      for (const bool inArena : {true, false}) {
        const DispatchHandle handle = rank.dispatch(inArena);
        rank.dispatch(!inArena, handle);
        rank.combine(inArena, handle);
        rank.combine(!inArena, handle);
        rank.combine(inArena, rank.dispatch(inArena, {}, 30));
      }
      require(rank.transport.damaged() == (!integrity && rank.transport.rank() == 1), "damage");
      for (const bool exact : {true, false}) {
        for (const bool withWeights : {true, false}) {
          rank.lowLatencyDispatch(Quantization::float8, withWeights);
          const auto handle = rank.lowLatencyDispatch(Quantization::none, withWeights);
          rank.lowLatencyCombine(handle, exact);
        }
      }
      rank.transport.leave();
    }));
  }
}

}  // namespace
}  // namespace mscclpp_ep::cpu
