// SPDX-License-Identifier: MIT
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>

#include "mscclpp_ep/bootstrap.hpp"
#include "transport/bootstrap_common.hpp"

namespace mscclpp_ep {

Bootstrap::~Bootstrap() = default;

void Bootstrap::barrier() { allGather({}); }

namespace {

using Bytes = Bootstrap::Bytes;

/// Where the threads of a group meet.
class Meeting {
 public:
  Meeting(int size, Seconds timeout)
      : timeout_(timeout),
        given_(static_cast<std::size_t>(size)),
        hasCome_(given_.size(), false),
        gone_(given_.size(), false) {}

  int size() const { return static_cast<int>(gone_.size()); }

  std::vector<Bytes> exchange(int rank, std::span<const std::byte> mine) {
    const auto deadline = deadlineAfter(timeout_);
    std::unique_lock lock(mutex_);
    const std::uint64_t generation = generation_;
    const auto index = static_cast<std::size_t>(rank);
    throwIfOver();
    EP_EXPECTS(!hasCome_[index], "rank ", rank,
               " is already in a call of its bootstrap in another thread");
    hasCome_[index] = true;
    given_[index].assign(mine.begin(), mine.end());
    if (missing().empty()) {
      complete();
      return *result_;
    }
    const auto isOver = [&] { return generation_ != generation || isBroken(); };
    if (!came_.wait_until(lock, deadline, isOver)) {
      // The others need not wait for the same ranks any longer.
      failure_ = missingText(timeout_, missing());
      came_.notify_all();
    }
    // A result that is there counts, whatever happened since: the next one needs this thread.
    if (generation_ == generation) throwIfOver();
    return *std::shared_ptr(result_);
  }

  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    gone_[static_cast<std::size_t>(rank)] = true;
    came_.notify_all();
  }

 private:
  bool isBroken() const { return failure_ || std::ranges::find(gone_, true) != gone_.end(); }

  void throwIfOver() const {
    if (failure_) throw Timeout(*failure_);
    std::vector<int> gone;
    for (int r = 0; r < size(); ++r) {
      if (gone_[static_cast<std::size_t>(r)]) gone.push_back(r);
    }
    if (!gone.empty()) {
      throw PeerFailure(cat("ranks that destroyed their bootstrap while others call it: ", gone));
    }
  }

  std::vector<int> missing() const {
    std::vector<int> ranks;
    for (int r = 0; r < size(); ++r) {
      if (!hasCome_[static_cast<std::size_t>(r)]) ranks.push_back(r);
    }
    return ranks;
  }

  void complete() {
    result_ = std::make_shared<const std::vector<Bytes>>(given_);
    hasCome_.assign(hasCome_.size(), false);
    ++generation_;
    came_.notify_all();
  }

  const Seconds timeout_;
  std::mutex mutex_;
  std::condition_variable came_;
  std::uint64_t generation_ = 0;
  std::vector<Bytes> given_;
  std::vector<bool> hasCome_;
  std::vector<bool> gone_;
  std::optional<std::string> failure_;
  std::shared_ptr<const std::vector<Bytes>> result_;
};

class LocalBootstrap final : public Bootstrap {
 public:
  LocalBootstrap(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank) {}
  LocalBootstrap(const LocalBootstrap&) = delete;
  LocalBootstrap& operator=(const LocalBootstrap&) = delete;
  ~LocalBootstrap() override { meeting_->leave(rank_); }

  int rank() const override { return rank_; }
  int size() const override { return meeting_->size(); }
  std::vector<Bytes> allGather(std::span<const std::byte> mine) override {
    return meeting_->exchange(rank_, mine);
  }

 private:
  const std::shared_ptr<Meeting> meeting_;
  const int rank_;
};

}  // namespace

std::vector<std::shared_ptr<Bootstrap>> makeLocalBootstraps(int size, Seconds timeout) {
  checkGroup(size, timeout);
  const auto meeting = std::make_shared<Meeting>(size, timeout);
  std::vector<std::shared_ptr<Bootstrap>> bootstraps;
  bootstraps.reserve(static_cast<std::size_t>(size));
  for (int rank = 0; rank < size; ++rank) {
    bootstraps.push_back(std::make_shared<LocalBootstrap>(meeting, rank));
  }
  return bootstraps;
}

}  // namespace mscclpp_ep
