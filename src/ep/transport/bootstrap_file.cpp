// SPDX-License-Identifier: MIT
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <span>
#include <sstream>
#include <thread>
#include <utility>

#include "mscclpp_ep/bootstrap.hpp"
#include "transport/bootstrap_common.hpp"
#include "transport/file_store.hpp"

// Files of an earlier run may lie at the same path, so nothing is believed that does not hold a
// number drawn in this run (a nonce).
//
//   PATH.hello.RANK      the nonce of a rank other than 0
//   PATH.roster          by rank 0: an id, and of each rank the nonce read and whether it has
//                        acknowledged this id. A stale nonce is replaced when its rank has started;
//                        then the id is new. When all have acknowledged, the id is the group's.
//   PATH.ack.RANK        the id of the last roster in which the rank found its own nonce
//   PATH.ID.NUMBER.RANK  what the rank gave in the group's gather of this number
//   PATH.ID.failed       why a rank gave up waiting
//   PATH.ID.bye.RANK     the rank has destroyed its bootstrap
//
// Every file appears whole, by a rename. A rank removes what it gave when it has read the next
// number of all, which they write only after they have read this one. The last that leaves removes
// the rest.

namespace mscclpp_ep {
namespace {

using Bytes = Bootstrap::Bytes;

/// Whether `done` became true before the deadline.
template <typename Done>
bool pollUntil(Clock::time_point deadline, const Done& done) {
  constexpr Clock::duration kLongestPause = std::chrono::milliseconds(5);
  Clock::duration pause = std::chrono::microseconds(200);
  while (true) {
    const bool isLast = Clock::now() >= deadline;
    if (done()) return true;
    if (isLast) return false;
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, kLongestPause);
  }
}

/// For destructors, which have nobody to tell. What cannot be removed is stale to the next run.
template <typename Work>
void cleanUp(const Work& work) noexcept {
  try {
    work();
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
  }
}

struct Member {
  std::string nonce = "-";
  bool acknowledged = false;
};

struct Roster {
  std::string id;
  std::vector<Member> members;
};

std::string toString(const Roster& roster) {
  std::string text = roster.id;
  for (const Member& member : roster.members) {
    text += cat("\n", member.nonce, " ", member.acknowledged ? 1 : 0);
  }
  return text;
}

/// Of any text: a roster without a nonce that one knows is of no use, but does no harm.
Roster parseRoster(const std::string& text) {
  std::istringstream words(text);
  Roster roster;
  words >> roster.id;
  for (Member member; words >> member.nonce >> member.acknowledged;) {
    roster.members.push_back(member);
  }
  return roster;
}

std::vector<int> notAcknowledged(const Roster& roster, int except) {
  std::vector<int> ranks;
  for (int r = 0; r < static_cast<int>(roster.members.size()); ++r) {
    if (r != except && !roster.members[static_cast<std::size_t>(r)].acknowledged) {
      ranks.push_back(r);
    }
  }
  return ranks;
}

/// Brings the ranks together under an id.
class Rendezvous {
 public:
  Rendezvous(const FileStore& files, int rank, int size)
      : files_(files),
        rank_(rank),
        size_(size),
        hello_(cat(".hello.", rank)),
        ack_(cat(".ack.", rank)) {}
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;
  /// By now the group has met, or this rank has given up.
  ~Rendezvous() {
    cleanUp([&] {
      if (rank_ == 0) {
        files_.removeIfHolds(kRoster, toString(roster_));
      } else {
        files_.removeIfHolds(hello_, nonce_);
        files_.removeIfHolds(ack_, roster_.id);
      }
    });
  }

  std::string meet(Seconds timeout) {
    if (rank_ == 0) {
      roster_.members.assign(static_cast<std::size_t>(size_), {});
      roster_.members[0] = {nonce_, true};
    } else {
      files_.publish(hello_, nonce_);
    }
    const auto haveMet = [&] { return rank_ == 0 ? lead() : follow(); };
    if (!pollUntil(deadlineAfter(timeout), haveMet)) {
      std::vector<int> missing = notAcknowledged(roster_, rank_);
      if (missing.empty()) missing.push_back(0);
      throw Timeout(missingText(timeout, missing));
    }
    return roster_.id;
  }

 private:
  bool lead() {
    bool isNew = roster_.id.empty();
    bool isChanged = false;
    for (int r = 1; r < size_; ++r) {
      Member& member = roster_.members[static_cast<std::size_t>(r)];
      std::string nonce = files_.read(cat(".hello.", r)).value_or(member.nonce);
      if (isNonce(nonce) && nonce != member.nonce) {
        member.nonce = std::move(nonce);
        isNew = true;
      } else if (!member.acknowledged && files_.read(cat(".ack.", r)) == roster_.id) {
        member.acknowledged = isChanged = true;
      }
    }
    if (isNew) {
      roster_.id = makeNonce();
      for (int r = 1; r < size_; ++r) {
        roster_.members[static_cast<std::size_t>(r)].acknowledged = false;
      }
    }
    if (isNew || isChanged) files_.publish(kRoster, toString(roster_));
    return notAcknowledged(roster_, rank_).empty();
  }

  bool follow() {
    Roster found = parseRoster(files_.read(kRoster).value_or(""));
    const auto own = std::ranges::find(found.members, nonce_, &Member::nonce);
    if (own == found.members.end() || !isNonce(found.id)) return false;
    EP_EXPECTS(static_cast<int>(found.members.size()) == size_, "rank ", rank_,
               " was given a group of ", size_, " ranks, and rank 0 one of ", found.members.size());
    if (found.id != roster_.id) files_.publish(ack_, found.id);
    roster_ = std::move(found);
    return notAcknowledged(roster_, 0).empty();
  }

  static constexpr const char* kRoster = ".roster";

  const FileStore& files_;
  const int rank_;
  const int size_;
  const std::string hello_;
  const std::string ack_;
  const std::string nonce_ = makeNonce();
  Roster roster_;  // rank 0: as published; the others: as last seen
};

class FileBootstrap final : public Bootstrap {
 public:
  FileBootstrap(const std::string& path, int rank, int size, Seconds timeout)
      : files_(path), rank_(rank), size_(size), timeout_(timeout) {
    if (size_ == 1) return;
    Rendezvous rendezvous(files_, rank_, size_);
    id_ = rendezvous.meet(timeout_);
    try {
      gather({});  // all have seen the last roster, so that it can go
    } catch (...) {
      leave();
      throw;
    }
  }
  FileBootstrap(const FileBootstrap&) = delete;
  FileBootstrap& operator=(const FileBootstrap&) = delete;
  ~FileBootstrap() override { leave(); }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::vector<Bytes> allGather(std::span<const std::byte> mine) override {
    EP_EXPECTS(::getpid() == process_,
               "a bootstrap was used in a fork of the process that made it");
    if (failure_) std::rethrow_exception(failure_);
    try {
      return gather(mine);
    } catch (...) {
      failure_ = std::current_exception();
      throw;
    }
  }

 private:
  std::string ofGroup(std::string_view what) const { return cat(".", id_, ".", what); }
  std::string gatherName(std::uint64_t number, int rank) const {
    return ofGroup(cat(number, ".", rank));
  }

  std::vector<Bytes> gather(std::span<const std::byte> mine) {
    std::vector<Bytes> all(static_cast<std::size_t>(size_));
    all[static_cast<std::size_t>(rank_)].assign(mine.begin(), mine.end());
    if (size_ == 1) return all;
    files_.publish(gatherName(number_, rank_),
                   {reinterpret_cast<const char*>(mine.data()), mine.size()});
    std::vector<int> missing;
    for (int r = 0; r < size_; ++r) {
      if (r != rank_) missing.push_back(r);
    }
    if (!pollUntil(deadlineAfter(timeout_), [&] { return collect(all, missing); })) {
      const std::string why = missingText(timeout_, missing);
      files_.publish(ofGroup("failed"), why);
      throw Timeout(why);
    }
    if (number_ > 0) files_.remove(gatherName(number_ - 1, rank_));
    ++number_;
    return all;
  }

  /// Takes what has come. Throws if the rest never will.
  bool collect(std::vector<Bytes>& all, std::vector<int>& missing) const {
    std::erase_if(missing, [&](int r) {
      const auto text = files_.read(gatherName(number_, r));
      if (!text) return false;
      const auto bytes = std::as_bytes(std::span(*text));
      all[static_cast<std::size_t>(r)].assign(bytes.begin(), bytes.end());
      return true;
    });
    if (missing.empty()) return true;
    if (const auto why = files_.read(ofGroup("failed"))) throw Timeout(*why);
    for (const int r : missing) {
      // It may have given its part, and left, since the look above.
      if (files_.read(ofGroup(cat("bye.", r))) && !files_.read(gatherName(number_, r))) {
        throw PeerFailure(cat("ranks that destroyed their bootstrap while others call it: ", r));
      }
    }
    return false;
  }

  void leave() noexcept {
    if (id_.empty() || ::getpid() != process_) return;
    cleanUp([&] {
      files_.publish(ofGroup(cat("bye.", rank_)), "");
      for (int r = 0; r < size_; ++r) {
        if (!files_.read(ofGroup(cat("bye.", r)))) return;
      }
      files_.removeAll(ofGroup(""));
    });
  }

  const FileStore files_;
  const int rank_;
  const int size_;
  const Seconds timeout_;
  const pid_t process_ = ::getpid();
  std::string id_;
  std::uint64_t number_ = 0;
  std::exception_ptr failure_;
};

}  // namespace

std::shared_ptr<Bootstrap> makeFileBootstrap(const std::string& path, int rank, int size,
                                             Seconds timeout) {
  checkGroup(size, timeout);
  EP_EXPECTS(0 <= rank && rank < size, "the rank is ", rank, "; it must be in [0, ", size, ")");
  return std::make_shared<FileBootstrap>(path, rank, size, timeout);
}

}  // namespace mscclpp_ep
