// SPDX-License-Identifier: MIT
// What calls of the C++ interface come after, whatever is called between the two of a dispatch.
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/event.hpp"
#include "support/oracle.hpp"
#include "support/ranks.hpp"

namespace mscclpp_ep {
namespace {

using testing::Bytes;
using testing::RankData;
using testing::Received;
using testing::require;
using testing::requireEqual;
using testing::runAsThreads;
using testing::Scenario;

constexpr int kRanks = 2;
constexpr int kPoison = 0xCD;

void check(cudaError_t result, const char* what) {
  require(result == cudaSuccess, what, ": ", cudaGetErrorString(result));
}

int numGpus() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cannot find GPUs");
  return count;
}

/// A stream of the current GPU, for the calls of a buffer.
class OwnStream {
 public:
  explicit OwnStream(Buffer& buffer) : buffer_(buffer) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  }
  ~OwnStream() {
    try {
      buffer_.forgetStream(view());
    } catch (const Error&) {
      // Expected: the buffer has failed, which fails the test.
    }
    (void)cudaStreamDestroy(stream_);
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;

  cudaStream_t get() const { return stream_; }
  Stream view() const { return Stream(stream_); }
  CallOptions call() const {
    CallOptions call;
    call.stream = view();
    return call;
  }
  Event event() const { return {view(), buffer_.options().device.index}; }
  void wait() const { check(cudaStreamSynchronize(stream_), "work on a stream"); }

 private:
  Buffer& buffer_;
  cudaStream_t stream_ = nullptr;
};

/// Holds up a stream until it is opened, or dropped.
class Gate {
 public:
  explicit Gate(const OwnStream& stream) : stream_(stream.get()) {
    check(cudaLaunchHostFunc(stream_, pass, &open_), "a gate");
  }
  ~Gate() {
    open();
    (void)cudaStreamSynchronize(stream_);  // on which it may still be looked at
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void open() {
    open_ = true;
    open_.notify_all();
  }

 private:
  static void pass(void* opened) { static_cast<std::atomic<bool>*>(opened)->wait(false); }

  cudaStream_t stream_;
  std::atomic<bool> open_{false};
};

/// An array in the memory of the current GPU.
class DeviceArray {
 public:
  DeviceArray(DataType dtype, std::initializer_list<std::int64_t> shape) {
    int device = 0;
    check(cudaGetDevice(&device), "the current GPU");
    view = makeView(nullptr, dtype, shape, {DeviceType::cuda, device});
    check(cudaMalloc(&view.data, numBytes(view) + 1), "memory");
    owner_.reset(view.data, [](void* data) { (void)cudaFree(data); });
  }
  template <typename T>
  DeviceArray(const std::vector<T>& values, DataType dtype,
              std::initializer_list<std::int64_t> shape)
      : DeviceArray(dtype, shape) {
    check(cudaMemcpy(view.data, values.data(), numBytes(view), cudaMemcpyHostToDevice), "a copy");
  }

  TensorView view;

 private:
  std::shared_ptr<void> owner_;
};

/// What a rank dispatches, and what it is to receive.
class Rank {
 public:
  Rank(const Scenario& s, int rank) : scenario_(s) {
    for (int r = 0; r < s.ranks; ++r) all_.push_back(testing::dataOf(s, r));
    data_ = all_[static_cast<std::size_t>(rank)];
    expected = testing::receivedBy(s, all_, rank);
    const std::int64_t tokens = data_.tokens;
    arrays_.reserve(6);
    inputs.x = add(data_.x, s.dtype, {tokens, s.hidden});
    inputs.topkIdx = add(data_.ids, DataType::int64, {tokens, s.topk});
    inputs.topkWeights = add(data_.weights, DataType::float32, {tokens, s.topk});
    inputs.isTokenInRank = add(data_.inRank, DataType::boolean, {tokens, s.ranks});
    inputs.numTokensPerRank = add(data_.perRank, DataType::int32, {s.ranks});
    inputs.numTokensPerExpert = add(data_.perExpert, DataType::int32, {s.experts});
  }

  const Scenario& scenario() const { return scenario_; }
  const Bytes& rows() const { return data_.x; }
  DispatchInputs rowsOnly() const {
    DispatchInputs only;
    only.x = inputs.x;
    return only;
  }

  DispatchInputs inputs;
  Received expected;

 private:
  template <typename T>
  TensorView add(const std::vector<T>& values, DataType dtype,
                 std::initializer_list<std::int64_t> shape) {
    return arrays_.emplace_back(values, dtype, shape).view;
  }

  Scenario scenario_;
  std::vector<RankData> all_;
  RankData data_;
  std::vector<DeviceArray> arrays_;
};

/// What a dispatch fills, poisoned on a stream that it comes after.
struct Result {
  Tensor x, topkIdx, topkWeights;
  DispatchHandle handle;

  Result(Buffer& buffer, const Rank& rank, bool topk, const OwnStream& stream) {
    const auto make = [&](DataType dtype, std::int64_t columns) {
      const Tensor tensor = buffer.empty({rank.expected.numRows, columns}, dtype, stream.view());
      check(cudaMemsetAsync(tensor.view.data, kPoison, numBytes(tensor.view), stream.get()),
            "poison");
      return tensor;
    };
    x = make(rank.scenario().dtype, rank.scenario().hidden);
    if (!topk) return;
    topkIdx = make(DataType::int64, rank.scenario().topk);
    topkWeights = make(DataType::float32, rank.scenario().topk);
  }

  DispatchOutputs outputs() const { return {x.view, {}, topkIdx.view, topkWeights.view}; }
};

Bytes onHost(const TensorView& view, const OwnStream& stream) {
  Bytes bytes(numBytes(view));
  check(
      cudaMemcpyAsync(bytes.data(), view.data, bytes.size(), cudaMemcpyDeviceToHost, stream.get()),
      "a copy");
  stream.wait();
  return bytes;
}

template <typename T>
void requireBytes(const TensorView& found, const std::vector<T>& expected, const OwnStream& stream,
                  const char* what) {
  const Bytes bytes = onHost(found, stream);
  requireEqual(bytes.size(), expected.size() * sizeof(T), cat("the bytes of ", what));
  require(bytes.empty() || std::memcmp(bytes.data(), expected.data(), bytes.size()) == 0, what,
          " differs");
}

/// Once `stream` is behind the dispatch.
void requireReceived(const Rank& rank, const Result& result, const OwnStream& stream) {
  requireBytes(result.x.view, rank.expected.x, stream, "x");
  requireBytes(result.handle.recvSourceIndex().view, rank.expected.sourceIndex, stream,
               "the source index");
  requireEqual(result.handle.numRecvTokens(), rank.expected.numRecv, "numRecvTokens");
  if (!result.topkIdx.view) return;
  requireBytes(result.topkIdx.view, rank.expected.ids, stream, "topk_idx");
  requireBytes(result.topkWeights.view, rank.expected.weights, stream, "topk_weights");
}

/// A call that has nothing to do with the dispatch that has been begun.
class OtherCall {
 public:
  explicit OtherCall(const Rank& rank)
      : topkIdx_(rank.inputs.topkIdx),
        numExperts_(rank.scenario().experts),
        perRank_(DataType::int32, {kRanks}),
        perExpert_(DataType::int32, {numExperts_}),
        inRank_(DataType::boolean, {topkIdx_.shape[0], kRanks}) {}

  void make(Buffer& buffer, const CallOptions& call) const {
    buffer.getDispatchLayout(topkIdx_, numExperts_, {perRank_.view, perExpert_.view, inRank_.view},
                             call);
  }

 private:
  TensorView topkIdx_;
  std::int64_t numExperts_;
  DeviceArray perRank_, perExpert_, inRank_;
};

Scenario scenarioOf(unsigned seed) {
  std::mt19937 random(seed);
  Scenario s;
  s.seed = seed;
  s.ranks = kRanks;
  for (int r = 0; r < kRanks; ++r) s.tokens.push_back(1 + random() % 300);
  s.experts = 2 + random() % 30;
  s.hidden = 8 * (1 + random() % 200);
  s.topk = 1 + random() % 8;
  return s;
}

/// Runs `program` on ranks that are threads, on all GPUs in turn.
void onGpus(const std::function<void(Buffer&)>& program) {
  const int gpus = numGpus();
  require(gpus > 0, "there is no GPU");
  runAsThreads(kRanks, [&](Bootstrap& bootstrap) {
    const int device = bootstrap.rank() % gpus;
    check(cudaSetDevice(device), "a GPU");
    BufferOptions options;
    options.device = {DeviceType::cuda, device};
    options.arenaBytes = std::int64_t{64} << 20;
    options.timeout = std::chrono::seconds(20);
    Buffer buffer(bootstrap, options);
    program(buffer);
    buffer.destroy();
  });
}

DispatchHandle dispatchOn(Buffer& buffer, const Rank& rank, const OwnStream& stream) {
  Result result(buffer, rank, true, stream);
  result.handle =
      buffer.finishDispatch(buffer.beginDispatch(rank.inputs, {}, stream.call()), result.outputs());
  requireReceived(rank, result, stream);
  return result.handle;
}

/// The rows of a cached dispatch come late on its stream, whatever is called `between` its halves.
void dispatchLate(Buffer& buffer, const OwnStream& stream,
                  const std::function<void(const OtherCall&)>& between) {
  // Nothing is allocated or freed while the gate is shut: that may wait for the GPU.
  const Rank rank(scenarioOf(7), buffer.rank());
  const DeviceArray rows(rank.rows(), DataType::uint8,
                         {static_cast<std::int64_t>(rank.rows().size())});
  const OtherCall other(rank);
  const DispatchHandle handle = dispatchOn(buffer, rank, stream);
  Result result(buffer, rank, false, stream);
  const std::size_t bytes = numBytes(rows.view);
  check(cudaMemsetAsync(rank.inputs.x.data, 0, bytes, stream.get()), "wrong rows");
  Gate gate(stream);
  check(cudaMemcpyAsync(rank.inputs.x.data, rows.view.data, bytes, cudaMemcpyDeviceToDevice,
                        stream.get()),
        "right rows");
  PendingDispatch pending = buffer.beginCachedDispatch(rank.rowsOnly(), handle, stream.call());
  between(other);
  result.handle = buffer.finishDispatch(std::move(pending), result.outputs());
  gate.open();
  requireReceived(rank, result, stream);
}

TEST_CASE("rows that a cached dispatch is to send may come late on its stream") {
  CHECK_NOTHROW(onGpus([](Buffer& buffer) {
    const OwnStream stream(buffer);
    const OwnStream second(buffer);
    // Memory that a call allocates with the gate shut.
    {
      const Tensor kept = buffer.empty({1 << 20}, DataType::uint8, second.view());
    }
    dispatchLate(buffer, stream, [](const OtherCall&) {});
    dispatchLate(buffer, stream,
                 [&](const OtherCall& other) { other.make(buffer, second.call()); });
    dispatchLate(buffer, stream, [&](const OtherCall& other) {
      CallOptions call = second.call();
      call.previous = second.event();
      call.async = true;
      other.make(buffer, call);
    });
    dispatchLate(buffer, stream, [&](const OtherCall&) {
      const Tensor tensor = buffer.empty({1 << 20}, DataType::uint8, second.view());
      check(cudaMemsetAsync(tensor.view.data, kPoison, 1 << 20, second.get()), "poison");
    });
    check(cudaDeviceSynchronize(), "work");
  }));
}

/// Dispatches of changing routing, of which several are under way.
class Player {
 public:
  Player(Buffer& buffer, unsigned seed) : buffer_(buffer), random_(seed) {
    for (unsigned i = 0; i < kRoutings; ++i) {
      ranks_.push_back(std::make_unique<Rank>(scenarioOf(seed + i), buffer.rank()));
      others_.emplace_back(*ranks_.back());
    }
  }

  void play() {
    // What is done is the same on all ranks; how it is ordered is up to each.
    const std::size_t routing = random_() % kRoutings;
    const auto known = handles_.find(routing);
    const bool again = known != handles_.end() && random_() % 2 == 0;
    dispatch(routing, again ? &known->second : nullptr);
    if (underWay_.size() == kMostUnderWay) finish();
  }
  void finish() {
    for (const auto& [routing, result, stream] : underWay_) {
      requireReceived(*ranks_[routing], result, streams_[stream]);
    }
    underWay_.clear();
  }

 private:
  static constexpr unsigned kRoutings = 4;
  static constexpr std::size_t kMostUnderWay = 5;

  struct UnderWay {
    std::size_t routing;
    Result result;
    std::size_t stream;
  };

  void dispatch(std::size_t routing, const DispatchHandle* cached) {
    const Rank& rank = *ranks_[routing];
    const std::size_t at = own_() % 2;
    const OwnStream& stream = streams_[at];
    Result result(buffer_, rank, cached == nullptr, stream);
    CallOptions call = streams_[own_() % 2].call();
    call.async = own_() % 2 == 0;
    if (own_() % 2 == 0 || !(call.stream == stream.view())) call.previous = stream.event();
    PendingDispatch pending = cached != nullptr
                                  ? buffer_.beginCachedDispatch(rank.rowsOnly(), *cached, call)
                                  : buffer_.beginDispatch(rank.inputs, {}, call);
    if (own_() % 3 == 0) others_[routing].make(buffer_, streams_[own_() % 2].call());
    result.handle = buffer_.finishDispatch(std::move(pending), result.outputs());
    Event(buffer_.commStream(), buffer_.options().device.index).wait(stream.view());
    handles_.insert_or_assign(routing, result.handle);
    underWay_.push_back({routing, std::move(result), at});
  }

  Buffer& buffer_;
  std::mt19937 random_;
  std::mt19937 own_{static_cast<unsigned>(buffer_.rank())};
  OwnStream streams_[2] = {OwnStream(buffer_), OwnStream(buffer_)};
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::map<std::size_t, DispatchHandle> handles_;
  std::vector<OtherCall> others_;
  std::vector<UnderWay> underWay_;
};

TEST_CASE("dispatches under way at once, ordered in every way, with other calls between") {
  CHECK_NOTHROW(onGpus([](Buffer& buffer) {
    Player player(buffer, 11);
    for (int i = 0; i < 300; ++i) player.play();
    player.finish();
    check(cudaDeviceSynchronize(), "work");
  }));
}

}  // namespace
}  // namespace mscclpp_ep
