// SPDX-License-Identifier: MIT
// The records that ranks exchange. One definition serves every backend, so they are plain bytes.
#ifndef MSCCLPP_EP_CORE_PACKETS_HPP_
#define MSCCLPP_EP_CORE_PACKETS_HPP_

#include <cstdint>
#include <type_traits>

namespace mscclpp_ep {

/// The rounds of an operation, in order; a message carries its own.
enum class Round : std::uint32_t {
  entry = 0,    ///< what each rank was called with, and counts
  counts = 1,   ///< counts that found no room in the entry, or word that GPUs have told them
  publish = 2,  ///< where rows go
};

enum class Verdict : std::uint32_t { go = 0, rejected = 1, noRoom = 2 };

inline constexpr int kReasonBytes = 232;

/// Whether a rank takes part, and if not, why.
struct Status {
  Verdict verdict = Verdict::go;
  std::uint32_t reserved = 0;
  char reason[kReasonBytes] = {};  ///< zero-terminated
};

/// What the ranks of one operation must agree on.
struct Signature {
  std::uint32_t operation = 0;
  std::uint32_t dtype = 0;
  std::uint32_t scaleDtype = 0;
  std::uint32_t hasWeights = 0;
  std::int64_t hidden = 0;
  std::int64_t numScales = 0;
  std::int64_t topk = -1;  ///< -1: none
  std::int64_t indexBytes = 0;
  std::int64_t numExperts = 0;
  std::uint64_t handleEpoch = 0;  ///< of the dispatch that a combine or cached dispatch refers to
  std::int64_t maxTokens = 0;     ///< M, in low-latency mode
  std::uint32_t quantization = 0;
  std::uint32_t exact = 0;
  std::uint32_t logfmt = 0;
  std::uint32_t countsOnGpu = 0;  ///< not exchanged by the hosts

  bool operator==(const Signature&) const = default;
};

/// The arrays that a dispatch fills at the receiver, one element a row.
enum Column : int {
  kRows,
  kScales,
  kTopkIdx,
  kTopkWeights,
  kSourceIndex,
  kChecksum,     ///< of the row in the columns before, in the integrity mode
  kSequenceTag,  ///< likewise: packTag()
  kNumColumns
};

/// How the bytes of an array are reached by a peer.
enum class Access : std::uint32_t {
  none = 0,      ///< there is no such array
  straight = 1,  ///< in place: where the user reads, or has written, it
  landing = 2,   ///< in the receiver's landing block, from which it copies rows as they arrive
  staged = 3,    ///< in a staging block, to which its owner copies rows while they are read
};

struct ArrayAddress {
  Access access = Access::none;
  std::uint32_t segment = 0;
  std::uint64_t offset = 0;
};

/// What goes with a row in the integrity mode. Where rows are pushed, two columns have it.
struct RowSeal {
  std::uint64_t checksum = 0;
  std::uint64_t tag = 0;
};

/// Names a row: the rank that sends it, the token that it is of or for, and the operation.
constexpr std::uint64_t packTag(int rank, std::int64_t token, std::uint64_t epoch) {
  return static_cast<std::uint64_t>(static_cast<std::uint16_t>(rank)) << 48 |
         static_cast<std::uint64_t>(static_cast<std::uint16_t>(epoch)) << 32 |
         static_cast<std::uint32_t>(token);
}
constexpr std::uint64_t tagRank(std::uint64_t tag) { return tag >> 48; }
constexpr std::uint64_t tagToken(std::uint64_t tag) { return tag & 0xFFFFFFFFU; }
constexpr std::uint64_t tagEpoch(std::uint64_t tag) { return tag >> 32 & 0xFFFFU; }

/// Round::entry of a dispatch, followed by the receiver's counts per local expert (int32).
struct DispatchEntry {
  Signature signature;
  Status status;
  std::uint64_t gpuEpoch = 0;
  std::int64_t numRows = 0;  ///< rows that this rank has for the receiver; at most, if they follow
  std::int64_t numCounts = 0;  ///< counts that follow, here and in Round::counts
};

/// Round::publish of a dispatch.
struct DispatchPublish {
  Status status;
  std::int64_t firstRow = 0;  ///< row of the first of the receiver's tokens
  std::int64_t capacity = 0;  ///< rows at or beyond this are dropped
  /// A landing column has this many rows for the receiver's tokens, used over and over: the one of
  /// ordinal o is row o modulo this, once the row before in its place has been copied out.
  std::int64_t ringRows = 0;
  ArrayAddress columns[kNumColumns];
  ArrayAddress counts;  ///< on a GPU, for packets, where counts are not in the entries
};

/// Round::entry of a combine: rows of the receiver's tokens stand in dispatch's order. On a GPU,
/// without an address if they are not where peers can read them.
struct CombineEntry {
  Signature signature;
  Status status;
  std::uint64_t gpuEpoch = 0;
  ArrayAddress rows;
  ArrayAddress weights;
  ArrayAddress seals;  ///< [N] RowSeal, in the integrity mode
};

/// Round::publish of a combine on a GPU: where the receiver puts its rows of the sender's tokens.
struct CombineLanding {
  Status status;
  std::int64_t numRows = 0;  ///< that there is room for: none if one had masked the other before
  ArrayAddress rows;         ///< a row for each token that was sent to the receiver
  ArrayAddress weights;      ///< likewise
  ArrayAddress flags;        ///< of chunks of rows
  ArrayAddress seals;        ///< of the rows that the sender pushes, as in a CombineEntry
};

/// Round::entry of a low-latency dispatch: where the sender has put its tokens, for all to read.
struct LowLatencyDispatchEntry {
  Signature signature;
  Status status;
  std::uint64_t gpuEpoch = 0;
  std::int64_t numTokens = 0;
  ArrayAddress rows;     ///< [T] rows as they are sent
  ArrayAddress scales;   ///< [T, S]
  ArrayAddress topkIdx;  ///< [T, K] int32, global ids
  ArrayAddress weights;  ///< [T, K] float32
  /// [2, T] RowSeal, in the integrity mode: of rows with their scales, and of ids with weights.
  ArrayAddress seals;
};

/// Round::entry of a low-latency combine.
struct LowLatencyCombineEntry {
  Signature signature;
  Status status;
  std::uint64_t gpuEpoch = 0;
  ArrayAddress weights;      ///< [T, K] float32 of the sender's tokens
  ArrayAddress rows;         ///< for the receiver's tokens, readable once kRowsStaged is raised
  std::int64_t numRows = 0;  ///< none if one had masked the other in the dispatch
  // In the integrity mode:
  ArrayAddress weightSeals;  ///< [T] RowSeal, if the weights are read
  ArrayAddress rowSeals;     ///< a RowSeal for each of the rows
};

static_assert(std::is_trivially_copyable_v<LowLatencyDispatchEntry>);
static_assert(std::is_trivially_copyable_v<LowLatencyCombineEntry>);
static_assert(std::is_trivially_copyable_v<DispatchEntry>);
static_assert(std::is_trivially_copyable_v<DispatchPublish>);
static_assert(std::is_trivially_copyable_v<CombineEntry>);
static_assert(std::is_trivially_copyable_v<CombineLanding>);

/// A signal: one 64-bit store carries a value and the tag of the operation that it belongs to.
/// Tags compare modulo 2^32, which is sound because every operation rewrites every slot.
constexpr std::uint64_t packSignal(std::uint32_t value, std::uint64_t tag) {
  return static_cast<std::uint64_t>(value) << 32 | static_cast<std::uint32_t>(tag);
}
/// The signal of a count, which may be 0: a word never written, which is 0, is none. Of counts
/// below 0, which are refused in the end, that of 0.
constexpr std::uint64_t packCount(std::int32_t count, std::uint64_t tag) {
  return packSignal(static_cast<std::uint32_t>(count < 0 ? 0 : count) + 1, tag);
}
constexpr std::uint32_t signalValue(std::uint64_t signal) {
  return static_cast<std::uint32_t>(signal >> 32);
}
/// -1: a word never written.
constexpr std::int64_t signalCount(std::uint64_t signal) {
  return std::int64_t{signalValue(signal)} - 1;
}
constexpr std::uint32_t signalTag(std::uint64_t signal) {
  return static_cast<std::uint32_t>(signal);
}

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_PACKETS_HPP_
