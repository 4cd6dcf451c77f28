// SPDX-License-Identifier: MIT
// Which bytes of an arena are free. Bookkeeping only: it never touches the memory.
#ifndef MSCCLPP_EP_CORE_BLOCK_ALLOCATOR_HPP_
#define MSCCLPP_EP_CORE_BLOCK_ALLOCATOR_HPP_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace mscclpp_ep {

struct BlockRange {
  std::uint32_t segment = 0;
  std::size_t offset = 0;
  std::size_t bytes = 0;
};

/// Best fit over a list of free ranges; of equal fits the one freed last, whose bytes are the
/// hottest in the caches.
class BlockAllocator {
 public:
  void addSegment(std::uint32_t segment, std::size_t bytes);

  /// A block of blockBytes(bytes), or nothing if no free range is that large.
  std::optional<BlockRange> allocate(std::size_t bytes);
  void release(const BlockRange& block);

  std::size_t usedBytes() const { return usedBytes_; }

 private:
  std::vector<BlockRange> free_;  ///< hottest last
  std::size_t usedBytes_ = 0;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_BLOCK_ALLOCATOR_HPP_
