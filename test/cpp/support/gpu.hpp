// SPDX-License-Identifier: MIT
// Ranks of the C++ interface on GPUs, their streams, and what they dispatch.
#ifndef MSCCLPP_EP_TEST_SUPPORT_GPU_HPP_
#define MSCCLPP_EP_TEST_SUPPORT_GPU_HPP_

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/diagnostics.hpp"
#include "mscclpp_ep/event.hpp"
#include "support/oracle.hpp"
#include "support/ranks.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::testing {

inline constexpr int kPoison = 0xCD;

/// A stream of the current GPU, for the calls of a buffer.
class OwnStream {
 public:
  explicit OwnStream(Buffer& buffer) : buffer_(buffer) {
    EP_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
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
  void wait() const { EP_CUDA_TRY(cudaStreamSynchronize(stream_), "work on a stream"); }

 private:
  Buffer& buffer_;
  cudaStream_t stream_ = nullptr;
};

/// Holds up a stream until it is opened, or dropped.
class Gate {
 public:
  explicit Gate(const OwnStream& stream) : stream_(stream.get()) {
    EP_CUDA_TRY(cudaLaunchHostFunc(stream_, pass, &open_), "a gate");
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
    view = makeView(nullptr, dtype, shape, {DeviceType::cuda, currentDevice()});
    EP_CUDA_TRY(cudaMalloc(&view.data, numBytes(view) + 1), "memory");
    owner_.reset(view.data, [](void* data) { (void)cudaFree(data); });
  }
  template <typename T>
  DeviceArray(const std::vector<T>& values, DataType dtype,
              std::initializer_list<std::int64_t> shape)
      : DeviceArray(dtype, shape) {
    EP_CUDA_TRY(cudaMemcpy(view.data, values.data(), numBytes(view), cudaMemcpyHostToDevice),
                "a copy");
  }

  TensorView view;

 private:
  std::shared_ptr<void> owner_;
};

/// What a rank dispatches, and what it is to receive.
class Rank {
 public:
  Rank(const Scenario& s, int rank) : scenario_(s) {
    for (int r = 0; r < s.ranks; ++r) all_.push_back(dataOf(s, r));
    data_ = all_[static_cast<std::size_t>(rank)];
    expected = receivedBy(s, all_, rank);
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

  Result(Buffer& buffer, const Rank& rank, bool topk, const OwnStream& stream)
      : Result(buffer, rank, rank.expected.numRows, topk, stream) {}
  Result(Buffer& buffer, const Rank& rank, std::int64_t rows, bool topk, const OwnStream& stream) {
    const auto make = [&](DataType dtype, std::int64_t columns) {
      const Tensor tensor = buffer.empty({rows, columns}, dtype, stream.view());
      EP_CUDA_TRY(cudaMemsetAsync(tensor.view.data, kPoison, numBytes(tensor.view), stream.get()),
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

inline Bytes onHost(const TensorView& view, const OwnStream& stream) {
  Bytes bytes(numBytes(view));
  EP_CUDA_TRY(
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
inline void requireReceived(const Rank& rank, const Result& result, const OwnStream& stream) {
  requireBytes(result.x.view, rank.expected.x, stream, "x");
  requireBytes(result.handle.recvSourceIndex().view, rank.expected.sourceIndex, stream,
               "the source index");
  requireEqual(result.handle.numRecvTokens(), rank.expected.numRecv, "numRecvTokens");
  if (!result.topkIdx.view) return;
  requireBytes(result.topkIdx.view, rank.expected.ids, stream, "topk_idx");
  requireBytes(result.topkWeights.view, rank.expected.weights, stream, "topk_weights");
}

/// A dispatch, compared with what the rank is to receive.
inline DispatchHandle dispatchOn(Buffer& buffer, const Rank& rank, const OwnStream& stream) {
  Result result(buffer, rank, true, stream);
  result.handle =
      buffer.finishDispatch(buffer.beginDispatch(rank.inputs, {}, stream.call()), result.outputs());
  requireReceived(rank, result, stream);
  return result.handle;
}

/// A scenario of any shape.
inline Scenario scenarioOf(unsigned seed, int ranks) {
  std::mt19937 random(seed);
  Scenario s;
  s.seed = seed;
  s.ranks = ranks;
  for (int r = 0; r < ranks; ++r) s.tokens.push_back(1 + random() % 300);
  s.experts = 2 + random() % 30;
  s.hidden = 8 * (1 + random() % 200);
  s.topk = 1 + random() % 8;
  return s;
}

/// Runs `program` on ranks that are threads, on all GPUs in turn. `interrupt(rank)`, if given, is
/// what its buffer calls in waits.
inline void onGpus(int ranks, const std::function<void(Buffer&)>& program,
                   const std::function<void(int)>& interrupt = {}) {
  const int gpus = cudaDeviceCount();
  require(gpus > 0, "there is no GPU");
  runAsThreads(ranks, [&](Bootstrap& bootstrap) {
    const int rank = bootstrap.rank();
    EP_CUDA_TRY(cudaSetDevice(rank % gpus), "a GPU");
    BufferOptions options;
    options.device = {DeviceType::cuda, rank % gpus};
    options.arenaBytes = std::int64_t{64} << 20;
    options.timeout = std::chrono::seconds(20);
    if (interrupt) options.pollInterrupt = [&interrupt, rank] { interrupt(rank); };
    Buffer buffer(bootstrap, options);
    program(buffer);
    buffer.destroy();
  });
}

}  // namespace mscclpp_ep::testing

#endif  // MSCCLPP_EP_TEST_SUPPORT_GPU_HPP_
