// SPDX-License-Identifier: MIT
#include "host/arena.hpp"

#include <algorithm>
#include <utility>

#include "core/check.hpp"
#include "core/memory_map.hpp"

namespace mscclpp_ep {

namespace {

// Small blocks share segments of this size, so that peers map few.
constexpr std::size_t kSmallestSegment = std::size_t{4} << 20;

}  // namespace

Arena::Arena(Transport& transport, std::size_t initialBytes, std::size_t maxBytes,
             MakeFence makeFence)
    : transport_(transport),
      maxBytes_(maxBytes),
      makeFence_(std::move(makeFence)),
      returned_(std::make_shared<ReturnedBlocks<BlockRange>>()) {
  if (initialBytes > 0) grow(std::min(initialBytes, maxBytes));
}

void Arena::takeReturned() {
  for (const BlockRange& block : returned_->collect(makeFence_)) {
    if (!isQuarantined(block)) allocator_.release(block);
  }
}

bool Arena::isQuarantined(const BlockRange& block) const {
  return std::any_of(quarantined_.begin(), quarantined_.end(), [&](const auto& at) {
    return at.segment == block.segment && at.offset >= block.offset &&
           at.offset < block.offset + block.bytes;
  });
}

void Arena::quarantine(const void* data) {
  if (const auto address = locate(data, 1)) quarantined_.push_back(*address);
}

std::size_t Arena::usedBytes() {
  takeReturned();
  return allocator_.usedBytes();
}

std::optional<ArenaBlock> Arena::allocate(std::size_t bytes) {
  takeReturned();
  std::optional<BlockRange> range = allocator_.allocate(bytes);
  if (!range && grow(blockBytes(bytes))) range = allocator_.allocate(bytes);
  if (!range) return std::nullopt;
  return wrap(*range);
}

/// Adds a segment of at least `bytes`, if that is allowed.
bool Arena::grow(std::size_t bytes) {
  const std::size_t room = maxBytes_ - std::min(segmentBytes_, maxBytes_);
  if (frozen_ || bytes > room) return false;
  const std::size_t wanted = std::min(std::max(bytes, kSmallestSegment), room / kPage * kPage);
  if (wanted < bytes || static_cast<std::int64_t>(wanted) > transport_.shareableBytes())
    return false;
  SharedBlock segment;
  try {
    segment = transport_.share(wanted);
  } catch (const SystemError&) {
    // Memory went to somebody else meanwhile. What finds no block takes the landing block, or
    // ordinary memory, whose own error names the size.
    return false;
  }
  segmentBytes_ += wanted;
  allocator_.addSegment(segment.id, wanted);
  segments_.emplace(segment.id, std::move(segment));
  return true;
}

ArenaBlock Arena::wrap(const BlockRange& range) {
  const SharedBlock& segment = segments_.at(range.segment);
  ArenaBlock block;
  block.address = {Access::straight, range.segment, range.offset};
  block.data = {segment.data + range.offset, [returned = returned_, range, owner = segment.owner](
                                                 std::byte*) { returned->add(range); }};
  return block;
}

ArenaBlock Arena::landing(std::size_t bytes) {
  if (bytes > maxBytes_) {
    throw InvalidArgument(cat("the operation needs ", bytes,
                              " bytes of arena, more than max_arena_bytes, which is ", maxBytes_));
  }
  if (bytes > landing_.bytes) {
    if (frozen_ && bytes > abandonedBytes_) {
      throw InvalidArgument(cat("the operation needs ", bytes,
                                " bytes, and after freeze() the landing block has ",
                                landing_.bytes));
    }
    const std::size_t wanted =
        frozen_ ? abandonedBytes_ : std::min(blockBytes(bytes), alignUp(maxBytes_, kPage));
    if (static_cast<std::int64_t>(wanted) > transport_.shareableBytes()) {
      throw SystemError(cat("the operation needs ", wanted, " bytes of memory, and only ",
                            transport_.shareableBytes(), " are available"));
    }
    if (keepsLanding_) {
      keptLandings_.push_back(std::exchange(landing_, {}));
    } else if (landing_.bytes > 0) {
      transport_.unshare(landing_.id);
    }
    landing_ = SharedBlock();
    landing_ = transport_.share(wanted);
  }
  return {{landing_.data, [owner = landing_.owner](std::byte*) {}},
          {Access::landing, landing_.id, 0}};
}

void Arena::abandonLanding() {
  abandonedBytes_ = std::max(abandonedBytes_, landing_.bytes);
  landing_ = SharedBlock();
}

ArenaBlock Arena::shareBeside(std::size_t bytes) {
  SharedBlock segment = transport_.share(alignUp(bytes, kPage));
  return {{segment.data, [owner = segment.owner](std::byte*) {}},
          {Access::straight, segment.id, 0}};
}

void Arena::freeze() {
  if (largestOperation_ > 0) landing(largestOperation_);
  frozen_ = true;
}

std::optional<ArrayAddress> Arena::locate(const void* data, std::size_t bytes) const {
  const auto* begin = static_cast<const std::byte*>(data);
  for (const auto& [id, segment] : segments_) {
    const bool inside = std::less_equal<>{}(segment.data, begin) &&
                        std::less_equal<>{}(begin + bytes, segment.data + segment.bytes);
    if (inside) {
      return ArrayAddress{Access::straight, id, static_cast<std::uint64_t>(begin - segment.data)};
    }
  }
  return std::nullopt;
}

}  // namespace mscclpp_ep
