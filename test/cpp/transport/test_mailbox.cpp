// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "support/ranks.hpp"
#include "transport/mailbox.hpp"
#include "transport/shared_memory.hpp"

namespace mscclpp_ep {
namespace {

using testing::contains;
using testing::errorOf;
using testing::kSanitized;
using testing::require;
using testing::runAsThreads;
using Seconds = std::chrono::duration<double>;

// Where the tag of a slot, and the sequence itself, begin anew.
constexpr std::array<std::uint64_t, 3> kStarts = {0, (std::uint64_t{1} << 32) - 7,
                                                  std::numeric_limits<std::uint64_t>::max() - 6};

SharedMemoryOptions withTimeout(Seconds timeout) {
  SharedMemoryOptions options;
  options.connect.timeout = timeout;
  return options;
}

/// A rank with one lane of mailboxes.
struct Rank {
  Rank(Bootstrap& bootstrap, std::uint64_t firstSequence, Seconds timeout = testing::kLongTimeout)
      : transport(bootstrap, withTimeout(timeout)),
        mailbox(transport, Lane::highThroughput, firstSequence) {}

  int size() const { return transport.size(); }

  SharedMemory transport;
  Mailbox mailbox;
};

/// The same bytes for the same numbers, on every rank. One message in eight is long, but for those
/// of round 0, which ranks may post without reading any: they take one slot.
Message messageOf(unsigned seed, int from, int to, std::uint64_t epoch, unsigned round) {
  std::seed_seq sequence{seed, static_cast<unsigned>(from), static_cast<unsigned>(to),
                         static_cast<unsigned>(epoch), round};
  std::minstd_rand random(sequence);
  const std::size_t most = round > 0 && random() % 8 == 0 ? 50000 : 300;
  Message message(random() % 8 == 1 ? 0 : random() % (most + 1));
  for (std::byte& byte : message) byte = static_cast<std::byte>(random() >> 8);
  return message;
}

std::vector<Message> outgoingOf(unsigned seed, const Rank& rank, std::uint64_t epoch,
                                unsigned round) {
  std::vector<Message> outgoing;
  for (int to = 0; to < rank.size(); ++to) {
    outgoing.push_back(messageOf(seed, rank.transport.rank(), to, epoch, round));
  }
  return outgoing;
}

void exchangeAndCheck(unsigned seed, Rank& rank, std::uint64_t epoch, unsigned round) {
  const auto& incoming =
      rank.mailbox.exchange(epoch, round, outgoingOf(seed, rank, epoch, round), "a message");
  for (int from = 0; from < rank.size(); ++from) {
    require(incoming[static_cast<std::size_t>(from)] ==
                messageOf(seed, from, rank.transport.rank(), epoch, round),
            "the message of rank ", from, " in epoch ", epoch, " round ", round, ", seed ", seed);
  }
}

constexpr std::uint64_t kEpochs = kSanitized ? 60 : 300;

TEST_CASE("messages of every size arrive whole and in order") {
  for (const int ranks : {1, 2, 3, 5}) {
    for (const std::uint64_t start : kStarts) {
      CAPTURE(ranks);
      CAPTURE(start);
      CHECK_NOTHROW(runAsThreads(ranks, [&](Bootstrap& bootstrap) {
        Rank rank(bootstrap, start);
        for (std::uint64_t epoch = 1; epoch <= kEpochs / static_cast<unsigned>(ranks); ++epoch) {
          for (unsigned round = 0; round < 3; ++round) exchangeAndCheck(11, rank, epoch, round);
        }
        rank.transport.leave();
      }));
    }
  }
}

TEST_CASE("sizes around those of a slot") {
  const std::vector<std::size_t> sizes{0,
                                       1,
                                       kSlotPayload - 1,
                                       kSlotPayload,
                                       kSlotPayload + 1,
                                       kMailboxDepth * kSlotPayload - 1,
                                       kMailboxDepth * kSlotPayload,
                                       kMailboxDepth * kSlotPayload + 1};
  CHECK_NOTHROW(runAsThreads(2, [&](Bootstrap& bootstrap) {
    Rank rank(bootstrap, kStarts[1]);
    std::uint64_t epoch = 0;
    for (const std::size_t mine : sizes) {
      for (const std::size_t others : sizes) {
        const std::size_t size = rank.transport.rank() == 0 ? mine : others;
        const auto& incoming = rank.mailbox.exchange(
            ++epoch, 0, std::vector<Message>(2, Message(size, std::byte{42})), "a message");
        require(incoming[0] == Message(mine, std::byte{42}), "the message of rank 0");
        require(incoming[1] == Message(others, std::byte{42}), "the message of rank 1");
      }
    }
  }));
}

/// In each epoch some ranks refuse: they post in round 0 and go on. The others see it in what they
/// get, and leave the epoch; without a refusal two more rounds follow.
void refuseAtRandom(unsigned seed, Rank& rank, std::uint64_t epochs) {
  std::mt19937 random(seed);  // the same on every rank
  for (std::uint64_t epoch = 1; epoch <= epochs; ++epoch) {
    std::vector<bool> refuses;
    for (int r = 0; r < rank.size(); ++r) refuses.push_back(random() % 4 == 0);
    if (refuses[static_cast<std::size_t>(rank.transport.rank())]) {
      rank.mailbox.post(epoch, 0, outgoingOf(seed, rank, epoch, 0), "a message");
      continue;
    }
    exchangeAndCheck(seed, rank, epoch, 0);
    if (std::ranges::find(refuses, true) != refuses.end()) continue;
    exchangeAndCheck(seed, rank, epoch, 1);
    exchangeAndCheck(seed, rank, epoch, 2);
  }
  // A rank that leaves takes no more messages away, for which others may wait.
  exchangeAndCheck(seed, rank, epochs + 1, 0);
}

TEST_CASE("ranks that refuse go on, and nobody loses count") {
  for (unsigned seed = 0; seed < 6; ++seed) {
    CAPTURE(seed);
    CHECK_NOTHROW(runAsThreads(3, [&](Bootstrap& bootstrap) {
      Rank rank(bootstrap, kStarts[seed % kStarts.size()]);
      refuseAtRandom(seed, rank, kEpochs);
      rank.transport.leave();
    }));
  }
}

TEST_CASE("a rank may be as many refusals ahead as a mailbox is deep") {
  for (const std::uint64_t start : kStarts) {
    CAPTURE(start);
    CHECK_NOTHROW(runAsThreads(3, [&](Bootstrap& bootstrap) {
      Rank rank(bootstrap, start);
      const std::vector<Message> short_(3, Message(5, std::byte{1}));
      const bool ahead = bootstrap.rank() == 1;
      for (std::uint64_t epoch = 1; ahead && epoch <= kMailboxDepth; ++epoch) {
        rank.mailbox.post(epoch, 0, short_, "room");
      }
      bootstrap.barrier();
      for (std::uint64_t epoch = 1; !ahead && epoch <= kMailboxDepth; ++epoch) {
        rank.mailbox.exchange(epoch, 0, short_, "a message");
      }
      for (std::uint64_t epoch = 10; epoch < 20; ++epoch) exchangeAndCheck(3, rank, epoch, 0);
      rank.transport.leave();
    }));
  }
}

TEST_CASE("ranks that all refuse do not wait for each other") {
  CHECK_NOTHROW(runAsThreads(3, [](Bootstrap& bootstrap) {
    Rank rank(bootstrap, kStarts[2]);
    for (std::uint64_t epoch = 1; epoch <= 50; ++epoch) {
      rank.mailbox.post(epoch, 0, std::vector<Message>(3, Message(5)), "room");
    }
    exchangeAndCheck(5, rank, 51, 0);
    rank.transport.leave();
  }));
}

TEST_CASE("a rank that refuses waits for room if it is further ahead") {
  CHECK_NOTHROW(runAsThreads(2, [&](Bootstrap& bootstrap) {
    Rank rank(bootstrap, 0, bootstrap.rank() == 0 ? Seconds(0.2) : testing::kLongTimeout);
    const std::vector<Message> short_(2, Message(5, std::byte{1}));
    if (bootstrap.rank() == 0) {
      for (std::uint64_t epoch = 1; epoch <= kMailboxDepth; ++epoch) {
        rank.mailbox.post(epoch, 0, short_, "room");
      }
      const std::string text = errorOf<Timeout>(
          [&] { rank.mailbox.post(kMailboxDepth + 1, 0, short_, "room for a message"); }, "post");
      require(contains(text, "room for a message of rank 1"), text);
    }
    bootstrap.barrier();
  }));
}

TEST_CASE("who has not sent is named") {
  CHECK_NOTHROW(runAsThreads(3, [&](Bootstrap& bootstrap) {
    Rank rank(bootstrap, 0, Seconds(0.2));
    if (bootstrap.rank() == 0) {
      rank.transport.beginOperation("dispatch", 31);
      const std::string text = errorOf<Timeout>(
          [&] { rank.mailbox.exchange(31, 0, std::vector<Message>(3), "the entry"); }, "exchange");
      require(contains(text, "dispatch (epoch 31) on rank 0"), text);
      require(contains(text, "the entry of ranks 1, 2"), text);
    }
    bootstrap.barrier();
  }));
}

TEST_CASE("ranks in different operations are told, not left waiting") {
  CHECK_NOTHROW(runAsThreads(2, [&](Bootstrap& bootstrap) {
    Rank rank(bootstrap, 0);
    const bool behind = bootstrap.rank() == 1;
    const std::string text = errorOf<PeerFailure>(
        [&] {
          try {
            rank.mailbox.exchange(behind ? 5 : 6, 0, std::vector<Message>(2), "the entry");
          } catch (...) {
            rank.transport.giveUp();
            throw;
          }
        },
        "exchange");
    require(contains(text, behind ? "rank 0 is in operation 6 already" : "rank 1 gave up"), text);
    bootstrap.barrier();
  }));
}

/// Posts a slot by hand, as a faulty peer might.
void forgeSlot(Rank& rank, int to, std::uint32_t bytes, std::uint64_t totalBytes) {
  const ControlMap map(rank.size());
  std::byte* slot =
      rank.transport.control(to) + map.slot(Lane::highThroughput, rank.transport.rank(), 0);
  auto& header = *reinterpret_cast<SlotHeader*>(slot);
  header.epoch = 1;
  header.round = 0;
  header.totalBytes = totalBytes;
  sharedWord(slot, 0).store(packSignal(bytes + 1, 0));
  rank.transport.ring(to);
}

TEST_CASE("a message that cannot be is refused") {
  struct Forged {
    std::uint32_t bytes;
    std::uint64_t totalBytes;
  };
  for (const Forged forged :
       {Forged{kSlotPayload + 1, 1 << 20}, Forged{10, 9}, Forged{10, std::uint64_t{1} << 50}}) {
    CAPTURE(forged.bytes);
    CHECK_NOTHROW(runAsThreads(2, [&](Bootstrap& bootstrap) {
      Rank rank(bootstrap, 0);
      if (bootstrap.rank() == 1) {
        forgeSlot(rank, 0, forged.bytes, forged.totalBytes);
      } else {
        const std::string text = errorOf<PeerFailure>(
            [&] { rank.mailbox.exchange(1, 0, std::vector<Message>(2), "the entry"); }, "exchange");
        require(contains(text, "rank 1 sent a malformed message"), text);
      }
      bootstrap.barrier();
    }));
  }
}

}  // namespace
}  // namespace mscclpp_ep
