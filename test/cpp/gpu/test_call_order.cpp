// SPDX-License-Identifier: MIT
// What calls of the C++ interface come after, whatever is called between the two of a dispatch.
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/event.hpp"
#include "support/gpu.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep {
namespace {

using testing::DeviceArray;
using testing::dispatchOn;
using testing::Gate;
using testing::kPoison;
using testing::onGpus;
using testing::OwnStream;
using testing::Rank;
using testing::requireReceived;
using testing::Result;
using testing::scenarioOf;

constexpr int kRanks = 2;

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

/// The rows of a cached dispatch come late on its stream, whatever is called `between` its halves.
void dispatchLate(Buffer& buffer, const OwnStream& stream,
                  const std::function<void(const OtherCall&)>& between) {
  // Nothing is allocated or freed while the gate is shut: that may wait for the GPU.
  const Rank rank(scenarioOf(7, kRanks), buffer.rank());
  const DeviceArray rows(rank.rows(), DataType::uint8,
                         {static_cast<std::int64_t>(rank.rows().size())});
  const OtherCall other(rank);
  const DispatchHandle handle = dispatchOn(buffer, rank, stream);
  Result result(buffer, rank, false, stream);
  const std::size_t bytes = numBytes(rows.view);
  EP_CUDA_TRY(cudaMemsetAsync(rank.inputs.x.data, 0, bytes, stream.get()), "wrong rows");
  Gate gate(stream);
  EP_CUDA_TRY(cudaMemcpyAsync(rank.inputs.x.data, rows.view.data, bytes, cudaMemcpyDeviceToDevice,
                              stream.get()),
              "right rows");
  PendingDispatch pending = buffer.beginCachedDispatch(rank.rowsOnly(), handle, stream.call());
  between(other);
  result.handle = buffer.finishDispatch(std::move(pending), result.outputs());
  gate.open();
  requireReceived(rank, result, stream);
}

TEST_CASE("rows that a cached dispatch is to send may come late on its stream") {
  CHECK_NOTHROW(onGpus(kRanks, [](Buffer& buffer) {
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
      EP_CUDA_TRY(cudaMemsetAsync(tensor.view.data, kPoison, 1 << 20, second.get()), "poison");
    });
    EP_CUDA_TRY(cudaDeviceSynchronize(), "work");
  }));
}

/// Dispatches of changing routing, of which several are under way.
class Player {
 public:
  Player(Buffer& buffer, unsigned seed) : buffer_(buffer), random_(seed) {
    for (unsigned i = 0; i < kRoutings; ++i) {
      ranks_.push_back(std::make_unique<Rank>(scenarioOf(seed + i, kRanks), buffer.rank()));
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
  CHECK_NOTHROW(onGpus(kRanks, [](Buffer& buffer) {
    Player player(buffer, 11);
    for (int i = 0; i < 300; ++i) player.play();
    player.finish();
    EP_CUDA_TRY(cudaDeviceSynchronize(), "work");
  }));
}

}  // namespace
}  // namespace mscclpp_ep
