// SPDX-License-Identifier: MIT
// The public buffer, with ranks as threads and as processes, against the oracle.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "mscclpp_ep/buffer.hpp"
#include "support/oracle.hpp"
#include "support/ranks.hpp"

namespace mscclpp_ep {
namespace {

using testing::Bytes;
using testing::Combined;
using testing::contains;
using testing::errorOf;
using testing::kLaunchers;
using testing::kSanitized;
using testing::Launcher;
using testing::RankData;
using testing::Received;
using testing::require;
using testing::requireEqual;
using testing::runAsThreads;
using testing::Scenario;
using Seconds = std::chrono::duration<double>;

/// Whose memory arrays lie in.
enum class Memory { arena, pool, callers };

/// An array of the caller's, filled with what no result has.
Tensor makeArray(Buffer& buffer, Memory memory, DataType dtype,
                 std::initializer_list<std::int64_t> shape) {
  Tensor tensor;
  if (memory == Memory::arena) {
    tensor = buffer.empty(shape, dtype);
  } else if (memory == Memory::pool) {
    tensor = buffer.emptyLocal(std::span(shape.begin(), shape.size()), dtype);
  } else {
    tensor.view = makeView(nullptr, dtype, shape);
    const auto bytes = std::make_shared<Bytes>(numBytes(tensor.view));
    tensor.view.data = bytes->data();
    tensor.owner = bytes;
  }
  std::fill_n(static_cast<std::byte*>(tensor.view.data), numBytes(tensor.view), std::byte{0xCD});
  return tensor;
}

template <typename T>
void requireValues(const TensorView& found, const std::vector<T>& expected, const char* what) {
  requireEqual(numBytes(found), expected.size() * sizeof(T), cat("the bytes of ", what));
  const auto* values = static_cast<const T*>(found.data);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (values[i] != expected[i]) {
      throw std::runtime_error(
          cat(what, " element ", i, " is ", values[i], " instead of ", expected[i]));
    }
  }
}

/// The first bytes are as expected; what follows them is not looked at.
void requireBytes(const TensorView& found, const Bytes& expected, const char* what) {
  require(numBytes(found) >= expected.size(), what, " has ", numBytes(found), " bytes");
  if (expected.empty()) return;
  require(std::memcmp(found.data, expected.data(), expected.size()) == 0, what, " differs");
}

/// A rank's data as the tensors that a dispatch takes.
class Inputs {
 public:
  Inputs(const Scenario& s, RankData data) : data_(std::move(data)) {
    const std::int64_t tokens = data_.tokens;
    views.x = makeView(data_.x.data(), s.dtype, {tokens, s.hidden});
    views.isTokenInRank = makeView(data_.inRank.data(), DataType::boolean, {tokens, s.ranks});
    views.numTokensPerRank = makeView(data_.perRank.data(), DataType::int32, {s.ranks});
    views.numTokensPerExpert = makeView(data_.perExpert.data(), DataType::int32, {s.experts});
    if (s.numScales > 0) bindScales(s);
    if (s.topk == 0) return;
    narrowIds_.assign(data_.ids.begin(), data_.ids.end());
    views.topkIdx = s.wideIds ? makeView(data_.ids.data(), DataType::int64, {tokens, s.topk})
                              : makeView(narrowIds_.data(), DataType::int32, {tokens, s.topk});
    views.topkWeights = makeView(data_.weights.data(), DataType::float32, {tokens, s.topk});
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  const RankData& data() const { return data_; }
  /// What a cached dispatch takes.
  DispatchInputs rowsOnly() const {
    DispatchInputs rows;
    rows.x = views.x;
    rows.scales = views.scales;
    return rows;
  }

  DispatchInputs views;

 private:
  void bindScales(const Scenario& s) {
    views.scales = makeView(data_.scales.data(), s.scaleDtype, {data_.tokens, s.numScales});
    if (!s.columnScales) return;
    const std::size_t element = itemSize(s.scaleDtype);
    const auto tokens = static_cast<std::size_t>(data_.tokens);
    const auto columns = static_cast<std::size_t>(s.numScales);
    columnScales_.resize(data_.scales.size());
    for (std::size_t i = 0; i < tokens * columns; ++i) {
      std::memcpy(columnScales_.data() + (i % columns * tokens + i / columns) * element,
                  data_.scales.data() + i * element, element);
    }
    views.scales.data = columnScales_.data();
    views.scales.strides = {1, data_.tokens};
  }

  RankData data_;
  std::vector<std::int32_t> narrowIds_;
  Bytes columnScales_;
};

std::vector<RankData> allData(const Scenario& s, unsigned repeat = 0) {
  std::vector<RankData> all;
  for (int rank = 0; rank < s.ranks; ++rank) all.push_back(testing::dataOf(s, rank, repeat));
  return all;
}

/// What a dispatch gave a rank.
struct Result {
  Tensor x, scales, topkIdx, topkWeights;
  DispatchHandle handle;

  DispatchOutputs outputs() const { return {x.view, scales.view, topkIdx.view, topkWeights.view}; }
};

Result makeOutputs(Buffer& buffer, const Scenario& s, std::int64_t rows, bool topk, Memory memory) {
  Result result;
  result.x = makeArray(buffer, memory, s.dtype, {rows, s.hidden});
  if (s.numScales > 0) {
    result.scales = makeArray(buffer, memory, s.scaleDtype, {rows, s.numScales});
  }
  if (!topk) return result;
  const DataType id = s.wideIds ? DataType::int64 : DataType::int32;
  result.topkIdx = makeArray(buffer, memory, id, {rows, s.topk});
  result.topkWeights = makeArray(buffer, memory, DataType::float32, {rows, s.topk});
  return result;
}

void checkLayout(Buffer& buffer, const Scenario& s, const Inputs& inputs) {
  if (s.topk == 0) return;
  const auto at = Memory::callers;
  const Tensor perRank = makeArray(buffer, at, DataType::int32, {s.ranks});
  const Tensor perExpert = makeArray(buffer, at, DataType::int32, {s.experts});
  const Tensor inRank = makeArray(buffer, at, DataType::boolean, {inputs.data().tokens, s.ranks});
  buffer.getDispatchLayout(inputs.views.topkIdx, s.experts,
                           {perRank.view, perExpert.view, inRank.view});
  requireValues(perRank.view, inputs.data().perRank, "num_tokens_per_rank");
  requireValues(perExpert.view, inputs.data().perExpert, "num_tokens_per_expert");
  requireValues(inRank.view, inputs.data().inRank, "is_token_in_rank");
}

void checkRows(const Scenario& s, const Received& expected, const Result& result) {
  requireBytes(result.x.view, expected.x, "x");
  if (s.numScales > 0) requireBytes(result.scales.view, expected.scales, "the scales");
}

void checkTopk(const Scenario& s, const Received& expected, const Result& result) {
  if (s.topk == 0) return;
  if (s.wideIds) {
    requireValues(result.topkIdx.view, expected.ids, "topk_idx");
  } else {
    const std::vector<std::int32_t> narrow(expected.ids.begin(), expected.ids.end());
    requireValues(result.topkIdx.view, narrow, "topk_idx");
  }
  requireValues(result.topkWeights.view, expected.weights, "topk_weights");
}

void checkHandle(const RankData& own, const Received& expected, const DispatchHandle& handle) {
  requireEqual(handle.numTokens(), own.tokens, "numTokens");
  requireEqual(handle.numRows(), expected.numRows, "numRows");
  requireEqual(handle.numRecvTokens(), expected.numRecv, "numRecvTokens");
  require(std::ranges::equal(handle.numRecvTokensPerExpert(), expected.perExpert),
          "the rows per expert are ", handle.numRecvTokensPerExpert(), " instead of ",
          expected.perExpert);
  require(std::ranges::equal(handle.numSendTokens(), own.perRank), "numSendTokens");
  require(std::ranges::equal(handle.recvRankPrefixSum(), expected.rankPrefixSum), "prefix sums");
  requireValues(handle.recvSourceIndex().view, expected.sourceIndex, "recvSourceIndex");
  requireValues(handle.isTokenInRank().view, own.inRank, "isTokenInRank");
}

void checkCounts(const Scenario& s, const Received& expected, const PendingDispatch& pending) {
  requireEqual(pending.numRows(), expected.numRows, "numRows");
  std::vector<std::int64_t> aligned;
  for (std::int64_t count : expected.perExpert) {
    while (count % s.alignment != 0) ++count;
    if (s.worstTokens == 0) aligned.push_back(count);
  }
  require(std::ranges::equal(pending.numRecvTokensPerExpert(), aligned), "counts per expert");
}

/// Rows that were dropped are an error of the next check, once.
void checkDropped(Buffer& buffer, const Received& expected) {
  if (expected.numRecv > expected.numRows) {
    const std::string text = errorOf<InvalidArgument>([&] { buffer.check(); }, "check");
    require(contains(text, cat(expected.numRecv - expected.numRows, " were dropped")), text);
  }
  buffer.check();
}

Result dispatch(Buffer& buffer, const Scenario& s, const Inputs& inputs, Memory memory) {
  const Received expected = testing::receivedBy(s, allData(s), buffer.rank());
  PendingDispatch pending =
      buffer.beginDispatch(inputs.views, {s.alignment, s.worstTokens, Layout::tokenMajor});
  checkCounts(s, expected, pending);
  Result result = makeOutputs(buffer, s, pending.numRows(), s.topk > 0, memory);
  result.handle = buffer.finishDispatch(std::move(pending), result.outputs());
  checkRows(s, expected, result);
  checkTopk(s, expected, result);
  checkHandle(inputs.data(), expected, result.handle);
  checkDropped(buffer, expected);
  return result;
}

Result dispatchAgain(Buffer& buffer, const Scenario& s, const DispatchHandle& handle,
                     unsigned repeat, Memory memory) {
  const std::vector<RankData> all = allData(s, repeat);
  const Inputs inputs(s, all[static_cast<std::size_t>(buffer.rank())]);
  const Received expected = testing::receivedBy(s, all, buffer.rank());
  PendingDispatch pending = buffer.beginCachedDispatch(inputs.rowsOnly(), handle);
  requireEqual(pending.numRows(), expected.numRows, "numRows");
  Result result = makeOutputs(buffer, s, pending.numRows(), false, memory);
  result.handle = buffer.finishDispatch(std::move(pending), result.outputs());
  checkRows(s, expected, result);
  checkHandle(inputs.data(), expected, result.handle);
  checkDropped(buffer, expected);
  return result;
}

Tensor biasOf(Buffer& buffer, const Scenario& s, int which, std::int64_t tokens) {
  Tensor bias = makeArray(buffer, Memory::callers, s.combineDtype, {tokens, s.hidden});
  auto* at = static_cast<std::byte*>(bias.view.data);
  for (std::int64_t i = 0; i < tokens * s.hidden; ++i, at += itemSize(s.combineDtype)) {
    testing::store(s.combineDtype,
                   testing::biasValue(which, buffer.rank(), i / s.hidden, i % s.hidden), at);
  }
  return bias;
}

/// A row for each that was received: what this rank's experts make of it.
Tensor expertRows(Buffer& buffer, const Scenario& s, const Received& received, Memory memory) {
  Tensor rows = makeArray(buffer, memory, s.combineDtype, {received.numRows, s.hidden});
  auto* at = static_cast<std::byte*>(rows.view.data);
  for (const testing::Row& row : received.rows) {
    for (std::int64_t column = 0; column < s.hidden; ++column, at += itemSize(s.combineDtype)) {
      testing::store(s.combineDtype,
                     testing::expertValue(buffer.rank(), row.source, row.token, column), at);
    }
  }
  return rows;
}

void combine(Buffer& buffer, const Scenario& s, const DispatchHandle& handle, Memory memory) {
  const std::vector<RankData> all = allData(s);
  const Received received = testing::receivedBy(s, all, buffer.rank());
  const Combined expected = testing::combinedAt(s, all, buffer.rank());
  const std::int64_t tokens = handle.numTokens();
  const Tensor rows = expertRows(buffer, s, received, memory);
  const Tensor bias0 = s.biases > 0 ? biasOf(buffer, s, 0, tokens) : Tensor{};
  const Tensor bias1 = s.biases > 1 ? biasOf(buffer, s, 1, tokens) : Tensor{};
  Tensor weights, outWeights;
  if (s.topk > 0) {
    weights = makeArray(buffer, memory, DataType::float32, {received.numRows, s.topk});
    std::ranges::copy(received.weights, static_cast<float*>(weights.view.data));
    outWeights = makeArray(buffer, memory, DataType::float32, {tokens, s.topk});
  }
  const Tensor out = makeArray(buffer, memory, s.combineDtype, {tokens, s.hidden});
  CombineInputs inputs{rows.view, weights.view, {}, {}};
  if (s.biases > 0) inputs.bias0 = bias0.view;
  if (s.biases > 1) inputs.bias1 = bias1.view;
  buffer.combine(inputs, handle, {out.view, outWeights.view});
  requireBytes(out.view, expected.x, "the combined x");
  if (s.topk > 0) requireValues(outWeights.view, expected.weights, "the combined weights");
}

/// Everything that can be done with one routing.
Result runAll(Buffer& buffer, const Scenario& s, Memory memory) {
  try {
    const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
    checkLayout(buffer, s, inputs);
    Result result = dispatch(buffer, s, inputs, memory);
    combine(buffer, s, result.handle, memory);
    dispatchAgain(buffer, s, result.handle, 1, memory);
    combine(buffer, s, result.handle, Memory::callers);
    return result;
  } catch (const std::exception& error) {
    throw std::runtime_error(cat("scenario ", s.seed, ", memory ", static_cast<int>(memory),
                                 ", rank ", buffer.rank(), ": ", error.what()));
  }
}

template <typename T>
T pick(std::mt19937& random, std::initializer_list<T> choices) {
  return choices.begin()[random() % choices.size()];
}

/// A scenario of any shape, small.
Scenario randomScenario(unsigned seed, int ranks, const std::vector<std::int32_t>& expertMap = {}) {
  std::mt19937 random(seed);
  Scenario s;
  s.seed = seed;
  s.ranks = ranks;
  for (int r = 0; r < ranks; ++r) s.tokens.push_back(random() % 4 == 0 ? 0 : random() % 50);
  s.expertMap = expertMap;
  s.experts = expertMap.empty() ? 1 + random() % 40 : static_cast<std::int64_t>(expertMap.size());
  s.hidden = pick<std::int64_t>(random, {1, 3, 8, 64, 129, 1024});
  s.dtype = pick(random, {DataType::bfloat16, DataType::float16, DataType::float32, DataType::uint8,
                          DataType::float8E4m3});
  s.topk = random() % 8 == 0 ? 0 : 1 + random() % 22;
  s.wideIds = random() % 2 == 0;
  s.percentNone = pick<unsigned>(random, {0, 10, 60, 100});
  s.numScales = random() % 2 == 0 ? 0 : 1 + random() % 9;
  s.scaleDtype = pick(random, {DataType::float32, DataType::float16, DataType::uint8});
  s.columnScales = random() % 2 == 0;
  s.alignment = pick<std::int64_t>(random, {1, 8, 128});
  if (s.topk > 0 && random() % 3 == 0) s.worstTokens = 1 + random() % 80;
  // Only rows of bytes may come back as other numbers than they went.
  s.combineDtype = pick(random, {DataType::bfloat16, DataType::float16, DataType::float32});
  s.biases = static_cast<int>(random() % 3);
  return s;
}

BufferOptions someOptions(int numThreads = 1) {
  BufferOptions options;
  options.maxArenaBytes = std::int64_t{64} << 20;
  options.numThreads = numThreads;
  options.timeout = testing::kLongTimeout;
  return options;
}

constexpr unsigned kScenarios = kSanitized ? 8 : 40;

TEST_CASE("random operations, in every memory, on one to eight ranks") {
  for (const Launcher& launcher : kLaunchers) {
    for (const int ranks : {1, 2, 3, 4, 8}) {
      for (const int threads : {1, 3}) {
        CAPTURE(launcher.name);
        CAPTURE(ranks);
        CAPTURE(threads);
        CHECK_NOTHROW(launcher.run(ranks, [&](Bootstrap& bootstrap) {
          Buffer buffer(bootstrap, someOptions(threads));
          for (unsigned i = 0; i < kScenarios; ++i) {
            const unsigned seed = 1000u * static_cast<unsigned>(ranks) + i;
            // Ranks may choose different memory in the same operation.
            const unsigned own = i % 5 == 0 ? static_cast<unsigned>(buffer.rank()) : 0;
            const auto memory = static_cast<Memory>((i + own) % 3);
            runAll(buffer, randomScenario(seed, ranks), memory);
          }
          buffer.destroy();
        }));
      }
    }
  }
}

TEST_CASE("experts placed by a map") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      BufferOptions options = someOptions();
      options.expertMap = {2, 0, 0, 2, 0, 2, 2};  // rank 1 has none
      Buffer buffer(bootstrap, options);
      for (unsigned seed = 0; seed < 12; ++seed) {
        runAll(buffer, randomScenario(seed, 3, options.expertMap), static_cast<Memory>(seed % 3));
      }
      buffer.destroy();
    }));
  }
}

/// A few short rows.
Scenario plainScenario(int ranks) {
  Scenario s;
  s.seed = 7;
  s.ranks = ranks;
  for (int r = 0; r < ranks; ++r) s.tokens.push_back(5 + r);
  return s;
}

/// Rows long enough to be streamed and to land in several steps.
Scenario largeScenario(int ranks) {
  Scenario s;
  s.seed = 99;
  s.ranks = ranks;
  s.tokens.assign(static_cast<std::size_t>(ranks), 300);
  s.tokens[0] = 190;
  s.hidden = 2048;
  s.numScales = 16;
  s.biases = 1;
  return s;
}

TEST_CASE("rows of kilobytes, streamed, landed and staged") {
  for (const Launcher& launcher : kLaunchers) {
    for (const int threads : {1, 3}) {
      CAPTURE(launcher.name);
      CAPTURE(threads);
      CHECK_NOTHROW(launcher.run(2, [&](Bootstrap& bootstrap) {
        Buffer buffer(bootstrap, someOptions(threads));
        for (const Memory memory : {Memory::arena, Memory::pool, Memory::callers}) {
          runAll(buffer, largeScenario(2), memory);
        }
        const BufferStats stats = buffer.stats();
        require(stats.straightRows > 0 && stats.landedRows > 0, "both ways of receiving");
        require(stats.pulledRows > 0 && stats.stagedRows > 0, "both ways of sending back");
        buffer.destroy();
      }));
    }
  }
}

TEST_CASE("random operations with the integrity mode, in every memory") {
  for (const Launcher& launcher : kLaunchers) {
    for (const int ranks : {1, 3}) {
      CAPTURE(launcher.name);
      CAPTURE(ranks);
      CHECK_NOTHROW(launcher.run(ranks, [&](Bootstrap& bootstrap) {
        BufferOptions options = someOptions(2);
        options.integrityCheck = true;
        options.firstEpoch = (std::uint64_t{1} << 32) - 60;
        Buffer buffer(bootstrap, options);
        for (unsigned i = 0; i < kScenarios; ++i) {
          runAll(buffer, randomScenario(77 + i, ranks), static_cast<Memory>(i % 3));
        }
        for (const Memory memory : {Memory::arena, Memory::callers}) {
          runAll(buffer, largeScenario(ranks), memory);
        }
        buffer.destroy();
      }));
    }
  }
}

TEST_CASE("counts of more experts than fit in one message") {
  for (const bool onOneRank : {false, true}) {
    CAPTURE(onOneRank);
    CHECK_NOTHROW(runAsThreads(2, [&](Bootstrap& bootstrap) {
      BufferOptions options = someOptions();
      if (onOneRank) options.expertMap.assign(9001, 0);
      Buffer buffer(bootstrap, options);
      Scenario s = plainScenario(2);
      s.tokens = {20, 9};
      s.experts = 9001;
      s.expertMap = options.expertMap;
      const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
      dispatch(buffer, s, inputs, Memory::arena);
      buffer.destroy();
    }));
  }
}

/// Takes what is left of an arena, so that results find no room in it.
std::vector<Tensor> fillArena(Buffer& buffer) {
  std::vector<Tensor> held;
  for (Tensor block; (block = buffer.empty({4096}, DataType::uint8)).inArena;) {
    held.push_back(block);
  }
  return held;
}

TEST_CASE("an arena that is full, or may not grow, has results land") {
  for (const Launcher& launcher : kLaunchers) {
    for (const bool frozen : {false, true}) {
      CAPTURE(launcher.name);
      CAPTURE(frozen);
      CHECK_NOTHROW(launcher.run(2, [&](Bootstrap& bootstrap) {
        BufferOptions options = someOptions();
        options.maxArenaBytes = std::int64_t{8} << 20;
        Buffer buffer(bootstrap, options);
        Scenario s = largeScenario(2);
        s.tokens = {60, 70};
        // A frozen buffer has room for operations as large as it has seen.
        runAll(buffer, s, Memory::arena);
        if (frozen) buffer.freeze();
        const std::vector<Tensor> held = fillArena(buffer);
        const BufferStats before = buffer.stats();
        for (const Memory memory : {Memory::arena, Memory::pool, Memory::callers}) {
          runAll(buffer, s, memory);
        }
        const BufferStats after = buffer.stats();
        requireEqual(after.straightRows, before.straightRows, "the rows that arrive in place");
        requireEqual(after.pulledRows, before.pulledRows, "the rows that are read in place");
        if (frozen) requireEqual(after.arenaBytes, before.arenaBytes, "the size of the arena");
        buffer.destroy();
      }));
    }
  }
}

TEST_CASE("a frozen buffer refuses what is larger than it has room for, on all ranks") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    Buffer buffer(bootstrap, someOptions());
    const Scenario small = plainScenario(2);
    runAll(buffer, small, Memory::callers);
    buffer.freeze();
    const std::vector<Tensor> held = fillArena(buffer);
    const Scenario s = largeScenario(2);
    const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
    const std::string text = errorOf<Error>(
        [&] {
          PendingDispatch pending = buffer.beginDispatch(inputs.views);
          const Result result = makeOutputs(buffer, s, pending.numRows(), true, Memory::callers);
          buffer.finishDispatch(std::move(pending), result.outputs());
        },
        "finish");
    require(contains(text, "freeze()"), text);
    runAll(buffer, small, Memory::callers);
    buffer.destroy();
  }));
}

TEST_CASE("results live on when the buffer is gone, and other threads drop them at any time") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      std::optional<Buffer> buffer(std::in_place, bootstrap, someOptions());
      std::mutex mutex;
      std::vector<Result> dropped;
      std::atomic<bool> done{false};
      std::thread dropper([&] {
        while (!done) {
          std::vector<Result> taken;
          const std::lock_guard lock(mutex);
          taken.swap(dropped);
        }
      });
      std::vector<std::pair<Scenario, Result>> kept;
      std::exception_ptr failure;
      try {
        for (unsigned seed = 0; seed < 15; ++seed) {
          const Scenario s = randomScenario(seed, 2);
          Result result = runAll(*buffer, s, Memory::arena);
          if (seed % 3 == 0) kept.emplace_back(s, result);
          const std::lock_guard lock(mutex);
          dropped.push_back(std::move(result));
        }
        buffer->destroy();
        buffer.reset();
      } catch (...) {
        failure = std::current_exception();
      }
      done = true;
      dropper.join();
      if (failure != nullptr) std::rethrow_exception(failure);
      for (const auto& [s, result] : kept) {
        const Received expected = testing::receivedBy(s, allData(s), bootstrap.rank());
        checkRows(s, expected, result);
        checkTopk(s, expected, result);
        requireValues(result.handle.recvSourceIndex().view, expected.sourceIndex,
                      "recvSourceIndex");
      }
    }));
  }
}

TEST_CASE("tags that wrap do not show") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      BufferOptions options = someOptions();
      options.firstEpoch = (std::uint64_t{1} << 32) - 8;
      Buffer buffer(bootstrap, options);
      for (unsigned seed = 0; seed < 10; ++seed) {  // four operations each
        runAll(buffer, randomScenario(seed, 3), static_cast<Memory>(seed % 3));
      }
      const Scenario s = randomScenario(3, 3);
      const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
      requireEqual(dispatch(buffer, s, inputs, Memory::arena).handle.epoch(),
                   options.firstEpoch + 40, "the epoch");
      buffer.destroy();
    }));
  }
}

TEST_CASE("a buffer can be moved, during a dispatch too") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    Buffer first(bootstrap, someOptions());
    const Scenario s = randomScenario(5, 2);
    const Inputs inputs(s, testing::dataOf(s, first.rank()));
    PendingDispatch pending = first.beginDispatch(inputs.views, {s.alignment, s.worstTokens});
    Buffer second(std::move(first));
    require(first.destroyed(), "nothing is left of a buffer that was moved from");
    errorOf<InvalidArgument>([&] { first.check(); }, "a buffer that was moved from");
    Result result = makeOutputs(second, s, pending.numRows(), s.topk > 0, Memory::arena);
    result.handle = second.finishDispatch(std::move(pending), result.outputs());
    checkRows(s, testing::receivedBy(s, allData(s), second.rank()), result);
    Buffer third = std::move(second);
    combine(third, s, result.handle, Memory::arena);
    third.destroy();
    third.destroy();
    require(third.destroyed(), "destroyed");
    errorOf<InvalidArgument>([&] { third.check(); }, "a buffer that was destroyed");
  }));
}

// Refusals: the operation ends for all, and the next one works.

/// Runs `mistake` on rank 1 and `right` on the others, which are told who refused and why; then
/// everything works.
void refuseOnRankOne(Buffer& buffer, const std::function<void()>& mistake,
                     const std::function<void()>& right, const std::string& why) {
  if (buffer.rank() == 1) {
    const std::string text = errorOf<InvalidArgument>(mistake, "the mistake");
    require(contains(text, why), text);
  } else {
    const std::string text = errorOf<PeerFailure>(right, "the other ranks");
    require(contains(text, "rank 1 refused the ") && contains(text, why), text);
  }
  runAll(buffer, plainScenario(buffer.size()), Memory::arena);
}

void refuseEverything(Buffer& buffer) {
  const Scenario s = plainScenario(buffer.size());
  const Inputs good(s, testing::dataOf(s, buffer.rank()));
  Inputs bad(s, testing::dataOf(s, buffer.rank()));
  bad.views.numTokensPerRank = {};
  const auto begin = [&] { buffer.beginDispatch(good.views); };
  refuseOnRankOne(
      buffer, [&] { buffer.beginDispatch(bad.views); }, begin, "num_tokens_per_rank is missing");

  const Result result = dispatch(buffer, s, good, Memory::arena);
  const auto finish = [&](const DispatchOutputs& outputs) {
    PendingDispatch pending = buffer.beginDispatch(good.views);
    buffer.finishDispatch(std::move(pending), outputs);
  };
  DispatchOutputs noX = result.outputs();
  noX.x = {};
  refuseOnRankOne(
      buffer, [&] { finish(noX); }, [&] { finish(result.outputs()); },
      "the output of x is missing");

  const auto repeat = [&](const DispatchHandle& handle) {
    buffer.beginCachedDispatch(good.rowsOnly(), handle);
  };
  refuseOnRankOne(buffer, [&] { repeat({}); }, [&] { repeat(result.handle); }, "handle is empty");

  refuseOnRankOne(
      buffer, [&] { buffer.combine({}, result.handle, {}); },
      [&] { combine(buffer, s, result.handle, Memory::arena); }, "x is missing");
}

TEST_CASE("a rank that refuses its arguments is named, and the group goes on") {
  for (const Launcher& launcher : kLaunchers) {
    for (const int ranks : {2, 3}) {
      CAPTURE(launcher.name);
      CAPTURE(ranks);
      CHECK_NOTHROW(launcher.run(ranks, [](Bootstrap& bootstrap) {
        Buffer buffer(bootstrap, someOptions());
        refuseEverything(buffer);
        buffer.destroy();
      }));
    }
  }
}

TEST_CASE("a rank may refuse by itself, several times ahead of the others") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    Buffer buffer(bootstrap, someOptions());
    const Scenario s = plainScenario(2);
    const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
    for (int i = 0; i < 9; ++i) {
      if (buffer.rank() == 1) {
        buffer.refuse(Operation::dispatch, cat("reason ", i));
        continue;
      }
      const std::string text =
          errorOf<PeerFailure>([&] { buffer.beginDispatch(inputs.views); }, "beginDispatch");
      require(contains(text, cat("rank 1 refused the dispatch: reason ", i)), text);
    }
    runAll(buffer, s, Memory::arena);
    buffer.destroy();
  }));
}

TEST_CASE("a dispatch that is abandoned, or dropped, ends for all") {
  for (const Launcher& launcher : kLaunchers) {
    for (const bool said : {true, false}) {
      CAPTURE(launcher.name);
      CAPTURE(said);
      CHECK_NOTHROW(launcher.run(3, [&](Bootstrap& bootstrap) {
        Buffer buffer(bootstrap, someOptions());
        const Scenario s = plainScenario(3);
        const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
        std::optional<PendingDispatch> pending = buffer.beginDispatch(inputs.views);
        if (buffer.rank() == 2) {
          if (said) buffer.abandonDispatch(std::move(*pending), "out of luck");
          pending.reset();
        } else {
          const Result result = makeOutputs(buffer, s, pending->numRows(), true, Memory::arena);
          const std::string text = errorOf<PeerFailure>(
              [&] { buffer.finishDispatch(std::move(*pending), result.outputs()); }, "finish");
          require(contains(text, "rank 2 refused the dispatch: "), text);
          require(contains(text, said ? "out of luck" : "dropped"), text);
        }
        runAll(buffer, s, Memory::pool);
        buffer.destroy();
      }));
    }
  }
}

TEST_CASE("a dispatch is finished once, and before anything else") {
  CHECK_NOTHROW(runAsThreads(1, [](Bootstrap& bootstrap) {
    Buffer buffer(bootstrap, someOptions());
    const Scenario s = plainScenario(1);
    const Inputs inputs(s, testing::dataOf(s, 0));
    PendingDispatch pending = buffer.beginDispatch(inputs.views);
    errorOf<InvalidArgument>([&] { buffer.beginDispatch(inputs.views); }, "a second dispatch");
    errorOf<InvalidArgument>([&] { buffer.refuse(Operation::combine, "no"); }, "a refusal");
    const Result result = makeOutputs(buffer, s, pending.numRows(), true, Memory::arena);
    buffer.finishDispatch(std::move(pending), result.outputs());
    // NOLINTNEXTLINE(bugprone-use-after-move): what it says is what is tested.
    errorOf<InvalidArgument>([&] { pending.numRows(); }, "a dispatch that is finished");
    runAll(buffer, s, Memory::arena);
    buffer.destroy();
  }));
}

TEST_CASE("ranks that disagree are all told who differs, and go on") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      Buffer buffer(bootstrap, someOptions());
      Scenario s = plainScenario(3);
      const Inputs usual(s, testing::dataOf(s, buffer.rank()));
      const DispatchHandle handle = dispatch(buffer, s, usual, Memory::arena).handle;
      if (buffer.rank() == 1) s.hidden = 16;
      const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
      const std::string hidden =
          errorOf<InvalidArgument>([&] { buffer.beginDispatch(inputs.views); }, "beginDispatch");
      require(contains(hidden, "16 on rank 1; 8 on ranks 0, 2"), hidden);
      const std::string operation = errorOf<InvalidArgument>(
          [&] {
            if (buffer.rank() == 2) combine(buffer, plainScenario(3), handle, Memory::arena);
            buffer.beginDispatch(usual.views);
          },
          "different operations");
      require(contains(operation, "combine on rank 2; dispatch on ranks 0, 1"), operation);
      runAll(buffer, plainScenario(3), Memory::arena);
      buffer.destroy();
    }));
  }
}

TEST_CASE("an operation larger than the arena may be is refused on all ranks") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    BufferOptions options = someOptions();
    options.maxArenaBytes = std::int64_t{1} << 20;
    Buffer buffer(bootstrap, options);
    Scenario s = plainScenario(2);
    s.tokens = {200, 200};
    s.hidden = 1 << 14;
    const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
    const auto attempt = [&] {
      PendingDispatch pending = buffer.beginDispatch(inputs.views);
      const Result result = makeOutputs(buffer, s, pending.numRows(), true, Memory::callers);
      buffer.finishDispatch(std::move(pending), result.outputs());
    };
    // Both find out for themselves, or from the other.
    require(contains(errorOf<Error>(attempt, "finish"), "max_arena_bytes"), "what is too small");
    runAll(buffer, plainScenario(2), Memory::callers);
    buffer.destroy();
  }));
}

// Failures: the buffer can only be destroyed.

TEST_CASE("a rank that does not come is waited for no longer than the timeout") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      BufferOptions options = someOptions();
      options.timeout = Seconds(0.3);
      Buffer buffer(bootstrap, options);
      const Scenario s = plainScenario(2);
      const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
      const auto begin = [&] { buffer.beginDispatch(inputs.views); };
      if (buffer.rank() == 0) {
        const std::string text = errorOf<Timeout>(begin, "beginDispatch");
        require(contains(text, "dispatch (epoch 1) on rank 0") && contains(text, "rank 1"), text);
      }
      bootstrap.barrier();
      if (buffer.rank() == 1) {
        const std::string text = errorOf<PeerFailure>(
            [&] {
              PendingDispatch pending = buffer.beginDispatch(inputs.views);
              const Result result = makeOutputs(buffer, s, pending.numRows(), true, Memory::arena);
              buffer.finishDispatch(std::move(pending), result.outputs());
            },
            "the late rank");
        require(contains(text, "rank 0 gave up"), text);
      }
      errorOf<PeerFailure>(begin, "a buffer that failed");
      errorOf<PeerFailure>([&] { buffer.check(); }, "a buffer that failed");
      buffer.destroy();
    }));
  }
}

TEST_CASE("a rank that leaves is noticed by the others") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      Buffer buffer(bootstrap, someOptions());
      const Scenario s = plainScenario(3);
      runAll(buffer, s, Memory::arena);
      const Inputs inputs(s, testing::dataOf(s, buffer.rank()));
      if (buffer.rank() == 1) {
        buffer.leave();
        require(buffer.destroyed(), "a buffer that was left");
      } else {
        // Which of the two that go is named is a matter of time.
        errorOf<PeerFailure>([&] { buffer.beginDispatch(inputs.views); }, "beginDispatch");
        buffer.destroy();
      }
      bootstrap.barrier();
    }));
  }
}

TEST_CASE("options are refused together") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    BufferOptions options = someOptions();
    if (bootstrap.rank() == 1) options.expertMap = {5};
    const auto make = [&] { const Buffer buffer(bootstrap, options); };
    if (bootstrap.rank() == 1) {
      require(contains(errorOf<InvalidArgument>(make, "rank 1"), "expert_map[0] is 5"), "why");
    } else {
      require(contains(errorOf<PeerFailure>(make, "rank 0"), "rank 1 refused"), "who");
    }
    if (bootstrap.rank() == 1) options.expertMap = {1};
    const std::string text = errorOf<InvalidArgument>(make, "different maps");
    require(contains(text, "expert_map none") && contains(text, "expert_map 1"), text);
    options.expertMap = {};
    options.integrityCheck = bootstrap.rank() == 1;
    const std::string mode = errorOf<InvalidArgument>(make, "different modes");
    require(contains(mode, "integrity_check false") && contains(mode, "integrity_check true"),
            mode);
  }));
}

TEST_CASE("several buffers live side by side") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    Buffer first(bootstrap, someOptions());
    Buffer second(bootstrap, someOptions());
    for (unsigned seed = 0; seed < 4; ++seed) {
      runAll(first, randomScenario(seed, 2), Memory::arena);
      runAll(second, randomScenario(seed + 9, 2), Memory::arena);
    }
    const Scenario s = plainScenario(2);
    const Inputs inputs(s, testing::dataOf(s, first.rank()));
    const DispatchHandle handle = dispatch(first, s, inputs, Memory::arena).handle;
    errorOf<Error>([&] { combine(second, s, handle, Memory::arena); }, "another buffer's handle");
    first.destroy();
    second.destroy();
  }));
}

#if MSCCLPP_EP_TEST_PROCESSES
TEST_CASE("a buffer is not used by a process that was forked after it was made") {
  CHECK_NOTHROW(runAsThreads(1, [](Bootstrap& bootstrap) {
    Buffer buffer(bootstrap, someOptions());
    testing::ChildProcess child([&] {
      errorOf<SystemError>([&] { buffer.empty({8}, DataType::uint8); }, "empty");
      errorOf<SystemError>([&] { buffer.refuse(Operation::combine, ""); }, "refuse");
    });
    requireEqual(child.finish(), std::string(), "the child's end");
    runAll(buffer, plainScenario(1), Memory::arena);
    buffer.destroy();
  }));
}
#endif

}  // namespace
}  // namespace mscclpp_ep
