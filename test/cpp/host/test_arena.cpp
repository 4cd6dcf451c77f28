// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "core/memory_map.hpp"
#include "host/arena.hpp"
#include "support/ranks.hpp"
#include "transport/shared_memory.hpp"

namespace mscclpp_ep {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

/// A rank alone with its memory.
struct Alone {
  Alone() {
    SharedMemoryOptions options;
    options.connect.timeout = testing::kLongTimeout;
    transport = std::make_unique<SharedMemory>(*bootstrap, options);
  }
  std::shared_ptr<Bootstrap> bootstrap = makeLocalBootstraps(1)[0];
  std::unique_ptr<SharedMemory> transport;
};

TEST_CASE("an arena begins with what was asked for, within its limit") {
  Alone alone;
  CHECK(Arena(*alone.transport, 0, 64 * kMiB).totalBytes() == 0);
  CHECK(Arena(*alone.transport, 8 * kMiB, 64 * kMiB).totalBytes() == 8 * kMiB);
  CHECK(Arena(*alone.transport, 8 * kMiB, 2 * kMiB).totalBytes() == 2 * kMiB);
}

TEST_CASE("blocks can be located, whole and in part; other memory cannot") {
  Alone alone;
  Arena arena(*alone.transport, 4 * kMiB, 64 * kMiB);
  const ArenaBlock block = arena.allocate(3 * kPage).value();
  CHECK(block.address.access == Access::straight);
  for (const std::size_t skip : {std::size_t{0}, std::size_t{17}, 3 * kPage}) {
    const auto found = arena.locate(block.data.get() + skip, 3 * kPage - skip);
    REQUIRE(found);
    CHECK(found->segment == block.address.segment);
    CHECK(found->offset == block.address.offset + skip);
    CHECK(alone.transport->peerMemory(0, found->segment, found->offset, 0) ==
          block.data.get() + skip);
  }
  const std::vector<std::byte> other(kPage);
  CHECK_FALSE(arena.locate(other.data(), 1));
  CHECK_FALSE(arena.locate(nullptr, 0));
  CHECK_FALSE(arena.locate(block.data.get(), 5 * kMiB));
}

TEST_CASE("an arena grows up to its limit") {
  Alone alone;
  Arena arena(*alone.transport, 0, 12 * kMiB);
  std::vector<ArenaBlock> held;
  while (auto block = arena.allocate(kMiB)) {
    REQUIRE(held.size() < 12);
    std::memset(block->data.get(), 1, kMiB);
    held.push_back(std::move(*block));
  }
  CHECK(held.size() == 12);
  CHECK(arena.totalBytes() == 12 * kMiB);
  CHECK(arena.usedBytes() == 12 * kMiB);
  held.clear();
  CHECK(arena.usedBytes() == 0);
  CHECK(arena.allocate(kMiB));
  CHECK_FALSE(arena.allocate(13 * kMiB));
}

TEST_CASE("what is let go of is used again before the arena grows") {
  Alone alone;
  Arena arena(*alone.transport, 4 * kMiB, 64 * kMiB);
  std::byte* const first = arena.allocate(kMiB)->data.get();
  for (int i = 0; i < 100; ++i) CHECK(arena.allocate(kMiB)->data.get() == first);
  CHECK(arena.totalBytes() == 4 * kMiB);
}

TEST_CASE("a frozen arena does not grow") {
  Alone alone;
  Arena arena(*alone.transport, 4 * kMiB, 64 * kMiB);
  arena.freeze();
  const auto all = arena.allocate(4 * kMiB);
  CHECK(all);
  CHECK_FALSE(arena.allocate(1));
  CHECK_THROWS_AS(arena.landing(1), InvalidArgument);
}

TEST_CASE("a frozen arena has room for the largest operation so far") {
  Alone alone;
  Arena arena(*alone.transport, 0, 64 * kMiB);
  for (const std::size_t bytes : {kPage, kMiB, 2 * kPage}) arena.noteOperation(bytes);
  CHECK(arena.landingBytes() == 0);
  arena.freeze();
  CHECK(arena.landing(kMiB).data != nullptr);
  CHECK_THROWS_AS(arena.landing(2 * kMiB), InvalidArgument);
}

TEST_CASE("a frozen arena has another landing block for one that was abandoned") {
  Alone alone;
  Arena arena(*alone.transport, 0, 64 * kMiB);
  arena.noteOperation(kMiB);
  arena.freeze();
  const ArenaBlock lost = arena.landing(kMiB);
  arena.abandonLanding();
  const ArenaBlock other = arena.landing(kPage);
  CHECK(other.address.segment != lost.address.segment);
  CHECK(arena.landing(kMiB).data.get() == other.data.get());
  CHECK_THROWS_AS(arena.landing(2 * kMiB), InvalidArgument);
}

TEST_CASE("the landing block is one, and grows") {
  Alone alone;
  Arena arena(*alone.transport, 0, 8 * kMiB);
  const ArenaBlock small = arena.landing(kMiB);
  CHECK(small.address.access == Access::landing);
  CHECK(arena.landing(kPage).data.get() == small.data.get());
  const ArenaBlock large = arena.landing(3 * kMiB);
  CHECK(large.address.segment != small.address.segment);
  CHECK(arena.landingBytes() == 3 * kMiB);
  std::memset(large.data.get(), 1, 3 * kMiB);
  std::memset(small.data.get(), 1, kMiB);  // its memory lives while it is held
  CHECK_FALSE(arena.locate(large.data.get(), 1));
  CHECK_THROWS_AS(arena.landing(8 * kMiB + 1), InvalidArgument);
}

TEST_CASE("memory beside the arena does not count, and comes also when it is frozen") {
  Alone alone;
  Arena arena(*alone.transport, kMiB, kMiB);
  arena.freeze();
  const ArenaBlock beside = arena.shareBeside(2 * kMiB);
  std::memset(beside.data.get(), 3, 2 * kMiB);
  CHECK(beside.address.access == Access::straight);
  CHECK(arena.totalBytes() == kMiB);
  CHECK(!arena.locate(beside.data.get(), 1).has_value());
  CHECK(arena.shareBeside(1).address.segment != beside.address.segment);
  CHECK(arena.allocate(kPage).has_value());
}

TEST_CASE("blocks outlive the arena and its transport") {
  auto alone = std::make_unique<Alone>();
  auto arena = std::make_unique<Arena>(*alone->transport, 4 * kMiB, 64 * kMiB);
  const auto block = arena->allocate(kMiB);
  const ArenaBlock landing = arena->landing(kMiB);
  arena.reset();
  alone.reset();
  std::memset(block->data.get(), 2, kMiB);
  std::memset(landing.data.get(), 2, kMiB);
}

/// Blocks, filled with a number of their own, from which it is seen if two share memory.
TEST_CASE("other threads may drop blocks at any time") {
  Alone alone;
  Arena arena(*alone.transport, 4 * kMiB, 16 * kMiB);
  std::mutex mutex;
  std::vector<ArenaBlock> toDrop;
  bool done = false;
  const auto dropper = [&] {
    while (true) {
      std::vector<ArenaBlock> taken;
      const std::lock_guard lock(mutex);
      taken.swap(toDrop);
      if (done && taken.empty()) return;
    }
  };
  const auto user = [&] {
    std::mt19937 random(5);
    for (int i = 0; i < 3000; ++i) {
      const std::size_t bytes = random() % (4 * kPage) + 1;
      auto block = arena.allocate(bytes);
      testing::require(block.has_value(), "there is room");
      std::memset(block->data.get(), i, bytes);
      const auto filled =
          std::count(block->data.get(), block->data.get() + bytes, static_cast<std::byte>(i));
      testing::require(filled == static_cast<std::ptrdiff_t>(bytes), "nobody else has it");
      const std::lock_guard lock(mutex);
      // Without a bound the user could outrun the dropper, up to the limit of the arena.
      if (toDrop.size() < 200) toDrop.push_back(std::move(*block));
      done = i == 2999;
    }
  };
  CHECK_NOTHROW(testing::runThreads(3, [&](int thread) { thread == 0 ? user() : dropper(); }));
  CHECK(arena.usedBytes() == 0);
}

/// Fences that pass when the test says so.
struct Gate {
  bool open = false;
  bool closedToNew = false;
  int made = 0;

  MakeFence maker() {
    struct Gated final : Fence {
      explicit Gated(const Gate& gate) : gate_(gate) {}
      bool passed() override { return gate_.open; }
      const Gate& gate_;
    };
    return [this]() -> std::unique_ptr<Fence> {
      if (closedToNew) return nullptr;
      ++made;
      return std::make_unique<Gated>(*this);
    };
  }
};

TEST_CASE("blocks that were dropped are used again when their fence has passed") {
  Alone alone;
  Gate gate;
  Arena arena(*alone.transport, 4 * kMiB, 4 * kMiB, gate.maker());
  const auto take = [&] { return arena.allocate(4 * kMiB); };
  CHECK(take());
  CHECK_FALSE(take());
  CHECK(gate.made == 1);
  CHECK_FALSE(take());
  CHECK(gate.made == 1);
  gate.open = true;
  const auto again = take();
  CHECK(again);
  CHECK_FALSE(take());
}

TEST_CASE("what was dropped can be made free at once, but not what waits for a fence") {
  Alone alone;
  Gate gate;
  Arena arena(*alone.transport, 8 * kMiB, 8 * kMiB, gate.maker());
  const auto take = [&] { return arena.allocate(4 * kMiB); };
  auto first = take();
  auto second = take();
  const std::byte* const place = second->data.get();
  first.reset();
  CHECK_FALSE(take());  // which makes a fence
  second.reset();
  arena.freeDropped();
  const auto again = take();
  REQUIRE(again);
  CHECK(again->data.get() == place);
  CHECK_FALSE(take());
  CHECK(gate.made == 1);
}

TEST_CASE("while there can be no fence, what was dropped waits for one") {
  Alone alone;
  Gate gate;
  gate.open = gate.closedToNew = true;
  Arena arena(*alone.transport, 4 * kMiB, 4 * kMiB, gate.maker());
  CHECK(arena.allocate(4 * kMiB));
  CHECK_FALSE(arena.allocate(4 * kMiB));
  gate.closedToNew = false;
  CHECK(arena.allocate(4 * kMiB));
}

TEST_CASE("a landing block that is replaced stays, if it is asked to") {
  Alone alone;
  Arena arena(*alone.transport, 0, 64 * kMiB);
  const std::uint32_t first = arena.landing(kMiB).address.segment;
  arena.keepLanding();
  const std::uint32_t second = arena.landing(8 * kMiB).address.segment;
  CHECK(first != second);
  CHECK(alone.transport->peerMemory(0, first, 0, kMiB) != nullptr);
}

}  // namespace
}  // namespace mscclpp_ep
