// SPDX-License-Identifier: MIT
#include "core/block_allocator.hpp"

#include "core/memory_map.hpp"

namespace mscclpp_ep {

void BlockAllocator::addSegment(std::uint32_t segment, std::size_t bytes) {
  free_.push_back({segment, 0, bytes});
}

std::optional<BlockRange> BlockAllocator::allocate(std::size_t bytes) {
  const std::size_t wanted = blockBytes(bytes);
  auto best = free_.end();
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    const bool fits = range->bytes >= wanted;
    if (fits && (best == free_.end() || range->bytes <= best->bytes)) best = range;
  }
  if (best == free_.end()) return std::nullopt;
  const BlockRange block{best->segment, best->offset, wanted};
  best->offset += wanted;
  best->bytes -= wanted;
  if (best->bytes == 0) free_.erase(best);
  usedBytes_ += wanted;
  return block;
}

void BlockAllocator::release(const BlockRange& block) {
  usedBytes_ -= block.bytes;
  BlockRange merged = block;
  std::erase_if(free_, [&merged](const BlockRange& range) {
    if (range.segment != merged.segment) return false;
    const bool before = range.offset + range.bytes == merged.offset;
    const bool after = merged.offset + merged.bytes == range.offset;
    if (before) merged.offset = range.offset;
    if (before || after) merged.bytes += range.bytes;
    return before || after;
  });
  free_.push_back(merged);
}

}  // namespace mscclpp_ep
