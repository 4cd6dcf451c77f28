// SPDX-License-Identifier: MIT
// The byte layout of the memory that ranks share: the control segment of a rank, in which it is
// signalled, and the blocks of its arena.
#ifndef MSCCLPP_EP_CORE_MEMORY_MAP_HPP_
#define MSCCLPP_EP_CORE_MEMORY_MAP_HPP_

#include <cstddef>
#include <cstdint>

#include "core/packets.hpp"
#include "mscclpp_ep/sizes.hpp"

namespace mscclpp_ep {

inline constexpr std::size_t kCacheLine = 64;
inline constexpr std::size_t kPage = 4096;

constexpr std::size_t alignUp(std::size_t value, std::size_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

/// Independent orders of operations within a buffer: high-throughput, and low-latency twice, so
/// that two micro-batches overlap. Only the first is served yet.
enum class Lane : int { highThroughput = 0, lowLatency0 = 1, lowLatency1 = 2 };
inline constexpr int kNumLanes = 3;

/// Messages that a rank may post to another before that one reads any. A rank that refuses its
/// arguments posts and goes on, so it may be this many operations ahead, or as many messages as it
/// posts in one that it abandons.
inline constexpr int kMailboxDepth = 4;
inline constexpr std::size_t kSlotBytes = 4096;

/// Begins each slot of a mailbox. `flag` is written last: {1 + bytes here, sequence number}.
struct SlotHeader {
  std::uint64_t flag;
  std::uint64_t epoch;
  std::uint64_t totalBytes;  ///< of the whole message, which may take several slots
  std::uint32_t round;
  std::uint32_t reserved[9];
};
static_assert(sizeof(SlotHeader) == kCacheLine);
inline constexpr std::size_t kSlotPayload = kSlotBytes - sizeof(SlotHeader);

/// Words that a rank raises at a peer as an operation proceeds, {rows so far, epoch}.
enum Progress : int {
  kRowsPushed,  ///< by a dispatch, into the peer's arena
  kRowsTaken,   ///< by a dispatch, out of the rows that the peer pushed into a landing block
  kRowsStaged,  ///< by a combine, in the sender's own memory, for the peer to read
  kRowsRead,    ///< by a combine, from the peer's memory
  kNumProgress
};

/// Words in which a rank's GPU tells a host counts of a dispatch, by packCount(): first of rows,
/// then of the choices of each of the host's experts.
inline constexpr std::size_t kCountWords = kPage / sizeof(std::uint64_t);

/// Offsets in a control segment of `numRanks` ranks. Every word has one writer: those indexed by a
/// rank are written by that rank, those of the header by the owner. The exception is the doorbell,
/// which any peer rings.
class ControlMap {
 public:
  explicit ControlMap(int numRanks) : numRanks_(static_cast<std::size_t>(numRanks)) {}

  static constexpr std::size_t doorbell() { return 0; }
  static constexpr std::size_t waiting() { return kCacheLine; }
  /// 0 connected, 1 destroyed.
  static constexpr std::size_t closed() { return 2 * kCacheLine; }
  /// {mode, number}: the collective call in which this rank is.
  static constexpr std::size_t call() { return 3 * kCacheLine; }

  /// {reason, epoch}: `peer` gave up.
  std::size_t abortWord(int peer) const { return word(kAbort, peer); }
  /// `peer` has reached destroy().
  std::size_t goodbye(int peer) const { return word(kGoodbye, peer); }
  /// How often `peer` has masked this rank and taken it in again: odd while it is masked.
  std::size_t mask(int peer) const { return word(kMask, peer); }

  std::size_t slot(Lane lane, int peer, std::uint64_t sequence) const {
    const std::size_t index = static_cast<std::size_t>(peer) * kMailboxDepth +
                              static_cast<std::size_t>(sequence % kMailboxDepth);
    return lanes() + static_cast<std::size_t>(lane) * laneBytes() + index * kSlotBytes;
  }
  /// Messages of this rank's that `peer` has taken.
  std::size_t consumed(Lane lane, int peer) const { return laneWord(lane, 0, peer); }
  std::size_t progress(Lane lane, Progress which, int peer) const {
    return laneWord(lane, 1 + which, peer);
  }

  /// kCountWords that the GPU of `peer` writes. A page a rank, those of all ranks in a row.
  std::size_t counts(int peer) const {
    return lanes() + kNumLanes * laneBytes() + static_cast<std::size_t>(peer) * kPage;
  }

  std::size_t bytes() const { return counts(static_cast<int>(numRanks_)); }

 private:
  enum Word : std::size_t { kAbort, kGoodbye, kMask, kNumWords };

  // A cache line a word: peers write theirs at the same time.
  std::size_t word(Word which, int peer) const {
    return 4 * kCacheLine + (which * numRanks_ + static_cast<std::size_t>(peer)) * kCacheLine;
  }
  std::size_t lanes() const { return alignUp(word(kNumWords, 0), kPage); }
  std::size_t laneBytes() const {
    return alignUp(numRanks_ * (kMailboxDepth * kSlotBytes + (1 + kNumProgress) * kCacheLine),
                   kPage);
  }
  std::size_t laneWord(Lane lane, int which, int peer) const {
    return lanes() + static_cast<std::size_t>(lane) * laneBytes() +
           numRanks_ * kMailboxDepth * kSlotBytes +
           (static_cast<std::size_t>(which) * numRanks_ + static_cast<std::size_t>(peer)) *
               kCacheLine;
  }

  std::size_t numRanks_;
};

/// Bytes of `rows` rows. Throws InvalidArgument for more than any memory has.
std::size_t arrayBytes(std::int64_t rows, std::size_t rowBytes);

/// Blocks come in sizes of four steps an octave, so that operations of about the same size reuse
/// each other's, and begin at multiples of a page.
std::size_t blockBytes(std::size_t wanted);

/// Where the columns of a landing block begin.
struct LandingMap {
  std::uint64_t offset[kNumColumns] = {};
  std::uint64_t bytes = 0;
};

/// A landing block with `rows` rows of those columns whose element in `rowBytes` is not 0.
LandingMap landingMap(std::int64_t rows, const std::int64_t (&rowBytes)[kNumColumns]);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_MEMORY_MAP_HPP_
