// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_HOST_ARENA_HPP_
#define MSCCLPP_EP_HOST_ARENA_HPP_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "core/block_allocator.hpp"
#include "core/packets.hpp"
#include "host/returned_blocks.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep {

/// Memory that peers reach, with its address for them.
struct ArenaBlock {
  std::shared_ptr<std::byte> data;  ///< gives the block back when the last copy dies
  ArrayAddress address;
};

/// The memory of a rank in which its results live while the user holds them, and into which peers
/// write. It grows by segments up to a limit and never shrinks.
class Arena {
 public:
  /// Without `makeFence`, blocks that were dropped are used by nobody.
  Arena(Transport& transport, std::size_t initialBytes, std::size_t maxBytes,
        MakeFence makeFence = {});

  /// A block, of a new segment if none is free. Nothing if the limit, the machine's memory or
  /// freeze() forbid that. Any thread may drop a block, which may outlive the arena.
  std::optional<ArenaBlock> allocate(std::size_t bytes);
  /// As ReturnedBlocks::freeDropped().
  void freeDropped() { returned_->freeDropped(); }

  /// The landing block, which is not for results: it is made, and made larger, when first needed.
  /// Its content lives until the next call. Throws InvalidArgument if it would exceed the
  /// limit, SystemError if there is not enough memory.
  ArenaBlock landing(std::size_t bytes);

  /// Memory beside all that, which does not count: a little, of use in every operation. Throws
  /// SystemError if there is not enough.
  ArenaBlock shareBeside(std::size_t bytes);

  /// The address of memory, if all of it lies in the arena.
  std::optional<ArrayAddress> locate(const void* data, std::size_t bytes) const;

  /// Never gives out again the block that holds `data`, if any does: a rank that has failed may
  /// still write to it.
  void quarantine(const void* data);
  /// From now on peers can use every landing block, also when it has been replaced by a larger one.
  void keepLanding() { keepsLanding_ = true; }
  /// As quarantine(), for the landing block: the next one is another.
  void abandonLanding();

  /// Tells how much an operation would take if it found no block: the landing block will have at
  /// least as much when the arena is frozen.
  void noteOperation(std::size_t bytes) { largestOperation_ = std::max(largestOperation_, bytes); }

  /// Throws as landing() does.
  void freeze();

  std::size_t maxBytes() const { return maxBytes_; }
  std::size_t totalBytes() const { return segmentBytes_ + landing_.bytes; }
  std::size_t usedBytes();
  std::size_t landingBytes() const { return landing_.bytes; }

 private:
  void takeReturned();
  bool isQuarantined(const BlockRange& block) const;
  bool grow(std::size_t bytes);
  ArenaBlock wrap(const BlockRange& range);

  Transport& transport_;
  const std::size_t maxBytes_;
  const MakeFence makeFence_;
  bool frozen_ = false;
  std::size_t largestOperation_ = 0;
  BlockAllocator allocator_;
  std::map<std::uint32_t, SharedBlock> segments_;
  std::size_t segmentBytes_ = 0;
  SharedBlock landing_;
  std::size_t abandonedBytes_ = 0;  ///< what a frozen arena may have again
  bool keepsLanding_ = false;
  std::vector<SharedBlock> keptLandings_;
  std::shared_ptr<ReturnedBlocks<BlockRange>> returned_;
  std::vector<ArrayAddress> quarantined_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_ARENA_HPP_
