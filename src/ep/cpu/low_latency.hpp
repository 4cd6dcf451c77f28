// SPDX-License-Identifier: MIT
// Low-latency operations. Each takes one of two lanes in turn, so that one can be sent while the
// one before has not been received. A rank leaves what it sends in its own memory (the staging of
// the lane), tells its peers where, and they fetch it: no rank needs to know what others have room
// for.
#ifndef MSCCLPP_EP_CPU_LOW_LATENCY_HPP_
#define MSCCLPP_EP_CPU_LOW_LATENCY_HPP_

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/backend.hpp"
#include "cpu/context.hpp"

namespace mscclpp_ep::cpu {

/// The memory of a lane in which peers read.
class Staging {
 public:
  explicit Staging(Transport& transport) : transport_(transport) {}

  /// Makes it at least this large. No peer may be reading. Throws SystemError.
  void reserve(std::size_t bytes);
  std::byte* data() const { return block_.data; }
  ArrayAddress address(std::size_t offset) const {
    return {Access::straight, block_.id, static_cast<std::uint64_t>(offset)};
  }

 private:
  Transport& transport_;
  SharedBlock block_;
};

/// Takes places for arrays behind each other, at lines of the cache.
class StagingPlan {
 public:
  std::size_t add(std::size_t bytes) {
    const std::size_t offset = bytes_;
    bytes_ += alignUp(bytes, kCacheLine);
    return offset;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

/// One lane of a rank.
struct LowLatencyLane {
  LowLatencyLane(const Context& parts, Lane which, std::uint64_t firstSequence)
      : mailbox(parts.transport, which, firstSequence),
        staging(parts.transport),
        context(parts.onLane(mailbox, which)),
        told(static_cast<std::size_t>(parts.size())) {}
  LowLatencyLane(const LowLatencyLane&) = delete;
  LowLatencyLane& operator=(const LowLatencyLane&) = delete;

  /// Notes that the peers are told of what is staged now.
  void noteReaders();
  /// Waits until no peer reads what was staged last.
  void awaitReaders();
  /// A peer that is taken in again reads nothing of what was staged before.
  void forgetReader(int peer) { told[static_cast<std::size_t>(peer)] = 0; }
  /// Tells the peers that this rank reads nothing of the operation any more.
  void raiseRead();

  Mailbox mailbox;
  Staging staging;
  Context context;
  std::vector<std::uint64_t> told;  ///< [R] epoch of the last staging that each can read; 0: none
  bool busy = false;                ///< an operation is sent and not received
};

/// What a lane's operation does once it is sent.
class LowLatencyReceive : public ReceiveState {
 public:
  explicit LowLatencyReceive(LowLatencyLane& of) : lane(of), epoch(of.context.epoch) {}

  virtual const char* name() const = 0;
  /// Fetches what the peers have staged.
  virtual void receive() = 0;

  LowLatencyLane& lane;
  const std::uint64_t epoch;
};

/// Measures how long each rank is waited for.
class WaitClock {
 public:
  explicit WaitClock(const TensorView& stats) : stats_(stats) {}

  /// Adds the time since this was made to what `rank` has cost.
  void add(int rank) const {
    if (!stats_) return;
    const auto passed = std::chrono::steady_clock::now() - begin_;
    static_cast<std::int64_t*>(stats_.data)[rank] +=
        std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count();
  }

 private:
  const TensorView stats_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

/// Stages and announces; the rest is done by receive().
std::unique_ptr<LowLatencyReceive> sendLowLatencyDispatch(LowLatencyLane& lane,
                                                          LowLatencyDispatchRequest request);
std::unique_ptr<LowLatencyReceive> sendLowLatencyCombine(LowLatencyLane& lane,
                                                         LowLatencyCombineRequest request);

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_LOW_LATENCY_HPP_
