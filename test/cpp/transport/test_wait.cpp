// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#include "core/memory_map.hpp"
#include "support/ranks.hpp"
#include "transport/segment.hpp"
#include "transport/wait.hpp"

namespace mscclpp_ep {
namespace {

using testing::kSanitized;
using namespace std::chrono_literals;

/// Two ranks' words in shared memory: each has a doorbell and a word that the other writes.
class Table {
 public:
  explicit Table(std::byte* data) : data_(data) {}
  SharedWord& word(int rank) const { return sharedWord(data_, at(rank) + 2 * kCacheLine); }
  Doorbell doorbell(int rank) const { return {data_ + at(rank), data_ + at(rank) + kCacheLine}; }

 private:
  static std::size_t at(int rank) { return static_cast<std::size_t>(rank) * 4 * kCacheLine; }
  std::byte* data_;
};

constexpr std::chrono::seconds kLongSleep{20};

/// Waits as ranks do. A ring of an earlier round may come late and end a sleep too soon, which is
/// harmless; a wake-up that is lost shows as a sleep of its full length.
template <typename Ready>
void waitFor(const Doorbell& bell, const Ready& ready, std::chrono::nanoseconds spin) {
  bool done = spinUntil(ready, spin);
  while (!done) {
    const auto start = std::chrono::steady_clock::now();
    done = bell.sleep(ready, kLongSleep);
    const auto slept = std::chrono::steady_clock::now() - start;
    testing::require(slept < kLongSleep / 2, "a wake-up was lost");
  }
}

/// Hands a number to and fro.
void handOver(const Table& table, int rank, std::uint64_t rounds, std::chrono::nanoseconds spin) {
  const auto tell = [&](std::uint64_t value) {
    table.word(1 - rank).store(value);
    table.doorbell(1 - rank).ring();
  };
  for (std::uint64_t i = 1; i <= rounds; ++i) {
    if (rank == 0) tell(i);
    waitFor(table.doorbell(rank), [&] { return table.word(rank).load() >= i; }, spin);
    if (rank == 1) tell(i);
  }
}

constexpr std::uint64_t kRounds = kSanitized ? 10000 : 30000;

TEST_CASE("no wake-up is lost between threads") {
  const auto memory = Segment::create(kPage);
  const Table table(memory->data());
  for (const std::chrono::nanoseconds spin : {0ns, 300ns, 2000ns}) {
    CAPTURE(spin.count());
    table.word(0).store(0);
    table.word(1).store(0);
    CHECK_NOTHROW(testing::runThreads(2, [&](int rank) { handOver(table, rank, kRounds, spin); }));
  }
}

#if MSCCLPP_EP_TEST_PROCESSES
TEST_CASE("no wake-up is lost between processes") {
  const auto memory = Segment::create(kPage);
  const Table table(memory->data());
  const auto ends =
      testing::endsOfProcesses(2, [&](int rank) { handOver(table, rank, kRounds, 300ns); });
  CHECK(ends == std::vector<std::string>(2));
}
#endif

TEST_CASE("a ring between the last look and the sleep counts") {
  const auto memory = Segment::create(kPage);
  const Table table(memory->data());
  const Doorbell bell = table.doorbell(0);
  const auto start = std::chrono::steady_clock::now();
  const bool awake = bell.sleep(
      [&] {
        const bool come = table.word(0).load() != 0;
        // The other rank, at the worst moment: this one has looked, and does not sleep yet.
        table.word(0).store(1);
        bell.ring();
        return come;
      },
      20s);
  CHECK(awake);
  CHECK(std::chrono::steady_clock::now() - start < 10s);
}

TEST_CASE("a sleep that nobody ends lasts as long as was asked") {
  const auto memory = Segment::create(kPage);
  const Doorbell bell = Table(memory->data()).doorbell(0);
  const auto start = std::chrono::steady_clock::now();
  CHECK_FALSE(bell.sleep([] { return false; }, 30ms));
  CHECK(std::chrono::steady_clock::now() - start >= 29ms);
}

TEST_CASE("what is ready needs no wake-up") {
  const auto memory = Segment::create(kPage);
  const Doorbell bell = Table(memory->data()).doorbell(0);
  CHECK(bell.sleep([] { return true; }, 100s));
  CHECK(spinUntil([] { return true; }, 0ns));
  CHECK_FALSE(spinUntil([] { return false; }, 1000ns));
  // Nobody sleeps: ringing is harmless, and is not kept for the next sleep.
  bell.ring();
  CHECK_FALSE(bell.sleep([] { return false; }, 1ms));
}

}  // namespace
}  // namespace mscclpp_ep
