// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "core/block_allocator.hpp"
#include "core/memory_map.hpp"

namespace mscclpp_ep {
namespace {

/// Which pages of which segments are taken: what the allocator claims, checked page by page.
class PageMap {
 public:
  void addSegment(std::uint32_t segment, std::size_t bytes) {
    taken_[segment].resize(bytes / kPage);
  }
  /// False if a page of the block is not there, or is in the other state already.
  bool set(const BlockRange& block, bool taken) {
    const auto found = taken_.find(block.segment);
    if (found == taken_.end() || block.offset % kPage != 0 || block.bytes % kPage != 0)
      return false;
    for (std::size_t page = block.offset / kPage; page < (block.offset + block.bytes) / kPage;
         ++page) {
      if (page >= found->second.size() || found->second[page] == taken) return false;
      found->second[page] = taken;
    }
    return true;
  }

 private:
  std::map<std::uint32_t, std::vector<bool>> taken_;
};

class Exercise {
 public:
  explicit Exercise(unsigned seed) : random_(seed) {
    for (const std::uint32_t segment : {1u, 2u, 7u}) addSegment(segment, segment * 64 * kPage);
  }

  void step() {
    if (!held_.empty() && draw(0, 99) < 45) return release(draw(0, held_.size() - 1));
    const std::size_t wanted = draw(0, 3) == 0 ? draw(0, 200 * kPage) : draw(0, 8 * kPage);
    const std::optional<BlockRange> block = allocator_.allocate(wanted);
    if (!block) return;
    CHECK(block->bytes == blockBytes(wanted));
    CHECK(pages_.set(*block, true));
    used_ += block->bytes;
    held_.push_back(*block);
    CHECK(allocator_.usedBytes() == used_);
  }

  void releaseAll() {
    while (!held_.empty()) release(draw(0, held_.size() - 1));
  }

  /// Every segment can be taken whole again.
  void checkWhole() {
    CHECK(allocator_.usedBytes() == 0);
    for (auto segment = bytes_.rbegin(); segment != bytes_.rend(); ++segment) {
      const std::optional<BlockRange> block = allocator_.allocate(segment->second);
      REQUIRE(block);
      CHECK(block->offset == 0);
      CHECK(pages_.set(*block, true));
    }
    CHECK_FALSE(allocator_.allocate(1));
  }

 private:
  std::size_t draw(std::size_t least, std::size_t most) {
    return std::uniform_int_distribution<std::size_t>(least, most)(random_);
  }
  void addSegment(std::uint32_t segment, std::size_t bytes) {
    allocator_.addSegment(segment, bytes);
    pages_.addSegment(segment, bytes);
    bytes_[segment] = bytes;
  }
  void release(std::size_t index) {
    const BlockRange block = held_[index];
    held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(index));
    allocator_.release(block);
    CHECK(pages_.set(block, false));
    used_ -= block.bytes;
    CHECK(allocator_.usedBytes() == used_);
  }

  std::mt19937 random_;
  BlockAllocator allocator_;
  PageMap pages_;
  std::map<std::uint32_t, std::size_t> bytes_;
  std::vector<BlockRange> held_;
  std::size_t used_ = 0;
};

TEST_CASE("blocks never overlap, and everything comes back in one piece") {
  for (unsigned seed = 0; seed < 20; ++seed) {
    CAPTURE(seed);
    Exercise exercise(seed);
    for (int i = 0; i < 2000; ++i) exercise.step();
    exercise.releaseAll();
    exercise.checkWhole();
  }
}

TEST_CASE("an allocator without a large enough range has nothing") {
  BlockAllocator allocator;
  CHECK_FALSE(allocator.allocate(1));
  allocator.addSegment(3, 4 * kPage);
  CHECK_FALSE(allocator.allocate(4 * kPage + 1));
  CHECK(allocator.allocate(4 * kPage));
  CHECK_FALSE(allocator.allocate(0));
}

/// Ten blocks of a page side by side, every second of which is let go in the order given.
std::vector<BlockRange> holes(BlockAllocator& allocator, const std::vector<std::size_t>& order) {
  allocator.addSegment(1, 10 * kPage);
  std::vector<BlockRange> blocks;
  for (int i = 0; i < 10; ++i) blocks.push_back(allocator.allocate(kPage).value());
  for (const std::size_t hole : order) allocator.release(blocks[2 * hole]);
  return blocks;
}

TEST_CASE("of equal fits the one freed last is taken first") {
  BlockAllocator allocator;
  const std::vector<std::size_t> order{3, 0, 4, 1, 2};
  const auto blocks = holes(allocator, order);
  for (auto hole = order.rbegin(); hole != order.rend(); ++hole) {
    CHECK(allocator.allocate(kPage).value().offset == blocks[2 * *hole].offset);
  }
}

TEST_CASE("the smallest range that fits is taken, also if a larger one is hotter") {
  BlockAllocator allocator;
  const auto blocks = holes(allocator, {0, 1, 2});
  allocator.release(blocks[3]);  // joins the holes around it to three pages
  CHECK(allocator.allocate(kPage).value().offset == blocks[0].offset);
  CHECK(allocator.allocate(3 * kPage).value().offset == blocks[2].offset);
}

TEST_CASE("blocks of different segments are not joined") {
  BlockAllocator allocator;
  allocator.addSegment(1, kPage);
  allocator.addSegment(2, kPage);
  const BlockRange first = allocator.allocate(kPage).value();
  const BlockRange second = allocator.allocate(kPage).value();
  allocator.release(first);
  allocator.release(second);
  CHECK_FALSE(allocator.allocate(2 * kPage));
}

}  // namespace
}  // namespace mscclpp_ep
