// SPDX-License-Identifier: MIT
// What hosts make of counts that GPUs tell them: threads write the words here.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "host/told_counts.hpp"
#include "support/ranks.hpp"
#include "transport/shared_memory.hpp"

namespace mscclpp_ep {
namespace {

using testing::contains;
using testing::errorOf;
using testing::kSanitized;
using testing::require;
using testing::requireEqual;
using testing::runAsThreads;
using Seconds = std::chrono::duration<double>;

constexpr std::int64_t kExperts = 5;
constexpr auto kRound = static_cast<std::uint32_t>(Round::counts);

SharedMemoryOptions optionsOf(Seconds timeout, bool shrink) {
  SharedMemoryOptions options;
  options.connect.timeout = timeout;
  options.shrink = shrink;
  return options;
}

/// A rank, of which `tell` is the GPU.
struct Rank {
  explicit Rank(Bootstrap& bootstrap, std::uint64_t first = 1,
                Seconds timeout = testing::kLongTimeout, bool shrink = false)
      : transport(bootstrap, optionsOf(timeout, shrink)),
        mailbox(transport, Lane::highThroughput, first),
        arena(transport, 0, 0) {
    context.epoch = first;
    context.shrink = shrink;
  }

  /// `counts`: of rows, then of each of the receiver's experts.
  void tell(int receiver, std::uint64_t epoch, const std::vector<std::int32_t>& counts) {
    const ControlMap map(transport.size());
    std::byte* words = transport.control(receiver) + map.counts(transport.rank());
    for (std::size_t i = 0; i < counts.size(); ++i) {
      sharedWord(words, i * sizeof(std::uint64_t)).store(packCount(counts[i], epoch));
    }
  }
  void tellAll(std::uint64_t epoch, const std::vector<std::int32_t>& counts) {
    for (int receiver = 0; receiver < transport.size(); ++receiver) tell(receiver, epoch, counts);
  }

  /// With room for any number of rows from each rank.
  DispatchPlan receive(std::int64_t most = std::numeric_limits<std::int32_t>::max()) {
    DispatchPlan plan;
    plan.numRowsFrom.assign(static_cast<std::size_t>(transport.size()), most);
    receiveToldCounts(context, kExperts, plan);
    return plan;
  }

  SharedMemory transport;
  Mailbox mailbox;
  Arena arena;
  BufferStats stats;
  Trace trace;
  HostContext context{transport, mailbox, arena, stats, trace};
};

std::vector<std::int32_t> countsOf(int rank, int receiver, std::uint64_t epoch) {
  std::seed_seq seed{static_cast<unsigned>(rank), static_cast<unsigned>(receiver),
                     static_cast<unsigned>(epoch)};
  std::minstd_rand random(seed);
  std::vector<std::int32_t> counts(1 + kExperts);
  for (std::int32_t& count : counts) {
    count = random() % 3 == 0 ? 0 : static_cast<std::int32_t>(random() % 1000);
  }
  return counts;
}

void requireReceived(const Rank& rank, const DispatchPlan& plan) {
  std::vector<std::int64_t> perExpert(kExperts);
  for (int from = 0; from < rank.transport.size(); ++from) {
    const auto counts = countsOf(from, rank.transport.rank(), rank.context.epoch);
    requireEqual(plan.numRowsFrom[static_cast<std::size_t>(from)], std::int64_t{counts[0]},
                 cat("the rows from rank ", from, " in epoch ", rank.context.epoch));
    for (std::size_t e = 0; e < perExpert.size(); ++e) perExpert[e] += counts[1 + e];
  }
  require(plan.perExpert == perExpert, "the counts of experts in epoch ", rank.context.epoch);
}

TEST_CASE("counts come from all ranks, early and late, where tags wrap too") {
  constexpr std::uint64_t kEpochs = kSanitized ? 40 : 200;
  for (const std::uint64_t first : {std::uint64_t{1}, (std::uint64_t{1} << 32) - 20}) {
    for (const int ranks : {1, 2, 3, 5}) {
      CAPTURE(first);
      CAPTURE(ranks);
      CHECK_NOTHROW(runAsThreads(ranks, [&](Bootstrap& bootstrap) {
        Rank rank(bootstrap, first);
        std::minstd_rand random(static_cast<unsigned>(rank.transport.rank() + 1));
        for (std::uint64_t i = 0; i < kEpochs; ++i, ++rank.context.epoch) {
          // Some are later than a host that waits spins.
          if (random() % 4 == 0) {
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
          }
          for (int receiver = 0; receiver < ranks; ++receiver) {
            rank.tell(receiver, rank.context.epoch,
                      countsOf(rank.transport.rank(), receiver, rank.context.epoch));
          }
          requireReceived(rank, rank.receive());
          // As the rounds of a dispatch that follow: nobody is an operation ahead.
          rank.mailbox.exchange(rank.context.epoch, static_cast<std::uint32_t>(Round::publish),
                                std::vector<Message>(static_cast<std::size_t>(ranks)), "the rest");
        }
        rank.transport.leave();
      }));
    }
  }
}

TEST_CASE("no more rows are taken than a rank has tokens, and none below 0") {
  CHECK_NOTHROW(runAsThreads(1, [](Bootstrap& bootstrap) {
    Rank rank(bootstrap);
    rank.tellAll(1, {1000, -3, 7, 0, 0, std::numeric_limits<std::int32_t>::max()});
    const DispatchPlan plan = rank.receive(64);
    requireEqual(plan.numRowsFrom[0], std::int64_t{64}, "the rows");
    require(plan.perExpert == std::vector<std::int64_t>{0, 7, 0, 0, 2147483647}, "the counts");
  }));
}

struct Circumstances {
  Seconds timeout = testing::kLongTimeout;
  bool shrink = false;
  bool stays = true;  ///< rank 1, until rank 0 is done
};

/// Runs rank 1, and then `look` on rank 0.
void afterRank1(const std::function<void(Rank&)>& rank1, const std::function<void(Rank&)>& look,
                const Circumstances& given = {}) {
  std::atomic<int> done{-1};  // the last rank that is
  const auto finish = [&](int rank) {
    done = rank;
    done.notify_all();
  };
  runAsThreads(2, [&](Bootstrap& bootstrap) {
    Rank rank(bootstrap, 8, given.timeout, given.shrink);
    bootstrap.barrier();  // both are connected
    rank.tellAll(8, {3, 0, 1, 2, 0, 0});
    if (rank.transport.rank() == 1) {
      rank1(rank);
      finish(1);
      if (given.stays) done.wait(1);
    } else {
      done.wait(-1);
      try {
        look(rank);
      } catch (...) {
        finish(0);
        throw;
      }
      finish(0);
    }
  });
}

TEST_CASE("a rank that has begun another dispatch has given this one up: its counts are 0") {
  CHECK_NOTHROW(afterRank1(
      [](Rank& rank) {
        rank.mailbox.post(8, kRound, std::vector<Message>(2), "word");
        rank.tell(0, 10, {9, 9, 9, 9, 9, 9});
      },
      [](Rank& rank) {
        const DispatchPlan plan = rank.receive();
        require(plan.numRowsFrom == std::vector<std::int64_t>{3, 0}, "the rows");
        require(plan.perExpert == std::vector<std::int64_t>{0, 1, 2, 0, 0}, "the counts");
      }));
}

TEST_CASE("words of long ago are no counts, and who has told none is named") {
  const auto tellOld = [](Rank& rank) {
    rank.tell(0, 7, {9, 9, 9, 9, 9, 9});
    rank.mailbox.post(8, kRound, std::vector<Message>(2), "word");
  };
  const auto look = [](Rank& rank) {
    const std::string text = errorOf<Timeout>([&] { rank.receive(); }, "counts that do not come");
    require(contains(text, "the counts of rank 1"), text);
  };
  CHECK_NOTHROW(afterRank1(tellOld, look, {.timeout = Seconds(0.3)}));
}

TEST_CASE("a rank that goes before it has told anything is noticed") {
  const auto tellOld = [](Rank& rank) { rank.tell(0, 7, {9, 9, 9, 9, 9, 9}); };
  const auto look = [](Rank& rank) {
    const std::string text =
        errorOf<PeerFailure>([&] { rank.receive(); }, "counts of a rank that has gone");
    require(contains(text, "rank 1"), text);
  };
  CHECK_NOTHROW(afterRank1(tellOld, look, {.stays = false}));
}

TEST_CASE("a rank that is masked is not waited for, and sends no rows") {
  const auto look = [](Rank& rank) {
    rank.transport.setMask(1, true);
    const DispatchPlan plan = rank.receive();
    require(plan.numRowsFrom == std::vector<std::int64_t>{3, 0}, "the rows");
  };
  CHECK_NOTHROW(afterRank1([](Rank&) {}, look, {.shrink = true}));
}

TEST_CASE("a page has room for a count of rows and of 511 experts") {
  CHECK(fitToldCounts(ExpertPlacement(511, 1, {}), 1));
  CHECK_FALSE(fitToldCounts(ExpertPlacement(512, 1, {}), 1));
  CHECK(fitToldCounts(ExpertPlacement(1022, 2, {}), 2));
  std::vector<std::int32_t> owners(600, 1);
  owners[0] = 0;
  CHECK_FALSE(fitToldCounts(ExpertPlacement(600, 2, owners), 2));
}

}  // namespace
}  // namespace mscclpp_ep
