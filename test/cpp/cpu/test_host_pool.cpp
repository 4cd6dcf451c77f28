// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/memory_map.hpp"
#include "cpu/host_pool.hpp"
#include "mscclpp_ep/error.hpp"
#include "support/ranks.hpp"

namespace mscclpp_ep::cpu {
namespace {

TEST_CASE("memory is aligned, writable, and as large as was asked") {
  HostPool pool;
  std::vector<std::shared_ptr<std::byte>> held;
  std::int64_t total = 0;
  for (const std::size_t bytes : {0, 1, 4096, 4097, 100000, 3 << 20}) {
    held.push_back(pool.allocate(bytes));
    CHECK(reinterpret_cast<std::uintptr_t>(held.back().get()) % kCacheLine == 0);
    std::memset(held.back().get(), 1, bytes);
    total += static_cast<std::int64_t>(blockBytes(bytes));
    CHECK(pool.bytes() == total);
  }
}

TEST_CASE("what is let go of is kept and used again, the hottest first") {
  HostPool pool;
  auto first = pool.allocate(5000);
  auto second = pool.allocate(5000);
  const std::byte* firstBytes = first.get();
  const std::byte* secondBytes = second.get();
  const std::int64_t bytes = pool.bytes();
  second.reset();
  first.reset();
  CHECK(pool.bytes() == bytes);
  first = pool.allocate(4999);  // of the same size of blocks
  second = pool.allocate(5001);
  CHECK(first.get() == firstBytes);
  CHECK(second.get() == secondBytes);
  CHECK(pool.bytes() == bytes);
}

TEST_CASE("blocks in use are never given out again") {
  HostPool pool;
  std::mt19937 random(3);
  std::vector<std::shared_ptr<std::byte>> held(20);
  for (int i = 0; i < 2000; ++i) {
    auto& block = held[random() % held.size()];
    block = pool.allocate(random() % 20000);
    for (const auto& other : held) CHECK((&other == &block || other != block));
  }
}

TEST_CASE("memory outlives the pool") {
  auto pool = std::make_unique<HostPool>();
  const auto block = pool->allocate(1 << 20);
  pool.reset();
  std::memset(block.get(), 1, 1 << 20);
}

TEST_CASE("more memory than there is, is refused") {
  HostPool pool;
  CHECK_THROWS_AS(pool.allocate(std::size_t{1} << 46), SystemError);
  CHECK(pool.bytes() == 0);
}

TEST_CASE("threads may take and drop memory at once") {
  HostPool pool;
  CHECK_NOTHROW(testing::runThreads(4, [&](int thread) {
    std::mt19937 random(static_cast<unsigned>(thread));
    for (int i = 0; i < 1000; ++i) {
      const std::size_t bytes = random() % 9000 + 1;
      const auto block = pool.allocate(bytes);
      std::memset(block.get(), thread + 1, bytes);
      testing::require(block.get()[bytes - 1] == static_cast<std::byte>(thread + 1),
                       "nobody else has it");
    }
  }));
}

}  // namespace
}  // namespace mscclpp_ep::cpu
