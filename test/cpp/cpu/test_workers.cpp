// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "cpu/workers.hpp"
#include "support/ranks.hpp"

namespace mscclpp_ep::cpu {
namespace {

TEST_CASE("every part is done once, by the end of run") {
  for (const int threads : {1, 2, 5}) {
    Workers workers(threads);
    CHECK(workers.numThreads() == threads);
    for (const std::int64_t count : {0, 1, 15, 16, 17, 1000}) {
      for (const std::int64_t grain : {1, 7, 16, 5000}) {
        CAPTURE(threads);
        CAPTURE(count);
        CAPTURE(grain);
        std::vector<int> done(static_cast<std::size_t>(count));
        workers.run(count, grain, [&](std::int64_t begin, std::int64_t end) {
          for (auto i = begin; i < end; ++i) ++done[static_cast<std::size_t>(i)];
        });
        CHECK(done == std::vector<int>(static_cast<std::size_t>(count), 1));
      }
    }
  }
}

TEST_CASE("parts are not empty, and helpers get none larger than the grain") {
  Workers workers(3);
  std::atomic<bool> sound{true};
  for (int i = 0; i < 50; ++i) {
    workers.run(1001, 10, [&](std::int64_t begin, std::int64_t end) {
      if (begin >= end || end > 1001 || end - begin > 10) sound = false;
    });
  }
  CHECK(sound);
}

TEST_CASE("what the workers wrote is seen after run, run after run") {
  const testing::Watchdog watchdog("runs in a row");
  Workers workers(4);
  std::vector<std::int64_t> values(500);
  for (int round = 1; round <= 2000; ++round) {
    workers.run(500, 16, [&](std::int64_t begin, std::int64_t end) {
      for (auto i = begin; i < end; ++i) values[static_cast<std::size_t>(i)] += i;
    });
  }
  bool right = true;
  for (std::size_t i = 0; i < values.size(); ++i) {
    right = right && values[i] == 2000 * static_cast<std::int64_t>(i);
  }
  CHECK(right);
}

TEST_CASE("helpers take part") {
  const testing::Watchdog watchdog("two parts at once");
  Workers workers(2);
  std::atomic<int> inside{0};
  // Both parts wait for each other, so two threads must be at it.
  workers.run(2, 1, [&](std::int64_t, std::int64_t) {
    ++inside;
    while (inside.load() < 2) std::this_thread::yield();
  });
  CHECK(inside == 2);
}

TEST_CASE("workers that never run anything end") {
  const testing::Watchdog watchdog("the end of idle workers");
  for (int i = 0; i < 100; ++i) const Workers workers(3);
}

}  // namespace
}  // namespace mscclpp_ep::cpu
