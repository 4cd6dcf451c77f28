// SPDX-License-Identifier: MIT
// How the kernels of the ranks wait for each other: words in the memory of each GPU, and what a
// kernel is told of them.
#ifndef MSCCLPP_EP_CUDA_ORDER_HPP_
#define MSCCLPP_EP_CUDA_ORDER_HPP_

#include <cstddef>
#include <cstdint>

#include "core/packets.hpp"

namespace mscclpp_ep::cuda {

/// What a rank raises at every peer, {value, tag of the epoch}. No value is 0.
enum class Word : int {
  entered,   ///< its memory is ready for the operation: to be written to, or to be read
  finished,  ///< it has written, or read, all that it will
  firstRow,  ///< one more than the row of its outputs to which the first of the peer's tokens goes
  parted,    ///< it goes on without the peer, from this operation on
  numWords,
  // What else a kernel can miss, which is none of these words:
  landed = numWords,  ///< rows of a chunk (combine_push.hpp)
  intact,             ///< a row as it was sent (integrity.hpp)
};

/// The words of one rank, at one peer each, in that peer's memory. A line of memory a word.
class SignalMap {
 public:
  explicit constexpr SignalMap(int numRanks) : numRanks_(numRanks) {}
  /// In the memory of the rank at which `writer` raises it; in words.
  constexpr std::size_t at(Word word, int writer) const {
    return static_cast<std::size_t>(static_cast<int>(word) * numRanks_ + writer) * kWordsApart;
  }
  constexpr std::size_t bytes() const {
    return static_cast<std::size_t>(static_cast<int>(Word::numWords) * numRanks_) * kWordsApart *
           sizeof(std::uint64_t);
  }

 private:
  static constexpr std::size_t kWordsApart = 16;
  int numRanks_;
};

/// What the GPU tells the host of waits that ended badly. In host memory; written once.
struct WaitFailure {
  std::uint64_t epoch = 0;  ///< written last; 0: there was none
  std::uint32_t peer = 0;
  std::uint32_t word = 0;
  std::uint64_t seen = 0;
  std::uint32_t aborted = 0;  ///< by the host, before the time was up
  // Of Word::intact:
  RowSeal expected;  ///< what would have been right
  RowSeal sent;      ///< what came with the row
};

/// What a kernel needs to go on without ranks. A rank that it waits for in vain is lost: it is
/// neither waited for nor signalled any more, and told so once, as it may live.
struct Shrinking {
  std::uint32_t* lost = nullptr;  ///< [R] in device memory
  // In host memory:
  const std::uint32_t* gone = nullptr;  ///< [R] the host's: not 0 for a rank not to be waited for
  std::uint64_t* losses = nullptr;      ///< [R] for the host: the epoch in which one was lost
};

/// What a kernel needs to be ordered with those of other ranks. Pointers to device memory, but for
/// `abort` and `failure`.
struct Order {
  std::uint64_t* epoch = nullptr;         ///< of the current operation; 0: the buffer has failed
  unsigned* blocksDone = nullptr;         ///< 0 between kernels
  unsigned* damaged = nullptr;            ///< not 0: a row was not intact
  std::uint64_t* own = nullptr;           ///< this rank's words
  std::uint64_t* const* peers = nullptr;  ///< [R] the words of each rank
  int rank = 0;
  int numRanks = 1;
  bool linked = true;                    ///< some rank is on another GPU
  std::uint64_t timeout = 0;             ///< nanoseconds
  const std::uint32_t* abort = nullptr;  ///< the host's: not 0 to end all waits
  WaitFailure* failure = nullptr;
  const Shrinking* shrinking = nullptr;  ///< null: a wait in vain ends the buffer
  /// What `entered` says, not 0: of the hosts' operation, in a buffer that shrinks, whose ranks may
  /// not all have enqueued the same ones.
  std::uint32_t operation = 1;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_ORDER_HPP_
