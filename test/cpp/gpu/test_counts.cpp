// SPDX-License-Identifier: MIT
// Counts that GPUs tell the hosts of all ranks.
#include <cuda_runtime.h>
#include <doctest/doctest.h>

#include <atomic>
#include <string>
#include <utility>

#include "mscclpp_ep/buffer.hpp"
#include "support/gpu.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep {
namespace {

using testing::contains;
using testing::dispatchOn;
using testing::errorOf;
using testing::onGpus;
using testing::OwnStream;
using testing::Rank;
using testing::require;
using testing::Result;
using testing::scenarioOf;

/// Steps of several ranks, in order.
class Steps {
 public:
  void reach(int step) {
    at_ = step;
    at_.notify_all();
  }
  void await(int step) const {
    for (int at = at_; at < step; at = at_) at_.wait(at);
  }
  int at() const { return at_; }

 private:
  std::atomic<int> at_{0};
};

void dispatchInVain(Buffer& buffer, const Rank& rank, const OwnStream& stream) {
  const auto work = [&] {
    PendingDispatch pending = buffer.beginDispatch(rank.inputs, {}, stream.call());
    const Result result(buffer, rank, pending.numRows(), true, stream);
    buffer.finishDispatch(std::move(pending), result.outputs());
  };
  const std::string text = errorOf<PeerFailure>(work, "a dispatch that rank 1 abandons");
  require(contains(text, "rank 1 refused the dispatch: it changed its mind"), text);
}

TEST_CASE("a rank may abandon a dispatch and begin another before its counts are read") {
  // Rank 0 is held up in its entry, for which it waits for rank 2. Rank 1 abandons the dispatch and
  // begins the next, whose counts come in the place of those of the first.
  enum Step { kNone, kBegun, kHeld, kAbandoned, kOverwritten };
  constexpr int kRanks = 3;
  Steps steps;
  const auto interrupt = [&](int rank) {
    if (rank == 0 && steps.at() == kBegun) {
      steps.reach(kHeld);
      steps.await(kOverwritten);
    } else if (rank == 1 && steps.at() == kAbandoned) {
      // It waits for the others to enter: its plan has been enqueued before.
      EP_CUDA_TRY(cudaDeviceSynchronize(), "the plan");
      steps.reach(kOverwritten);
    }
  };
  const auto program = [&](Buffer& buffer) {
    const OwnStream stream(buffer);
    const Rank first(scenarioOf(3, kRanks), buffer.rank());
    const Rank second(scenarioOf(4, kRanks), buffer.rank());
    dispatchOn(buffer, second, stream);
    if (buffer.rank() == 0) steps.reach(kBegun);
    if (buffer.rank() == 2) steps.await(kHeld);
    if (buffer.rank() == 1) {
      buffer.abandonDispatch(buffer.beginDispatch(first.inputs, {}, stream.call()),
                             "it changed its mind");
      steps.reach(kAbandoned);
    } else {
      dispatchInVain(buffer, first, stream);
    }
    dispatchOn(buffer, second, stream);
  };
  CHECK_NOTHROW(onGpus(kRanks, program, interrupt));
}

}  // namespace
}  // namespace mscclpp_ep
