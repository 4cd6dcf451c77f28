// SPDX-License-Identifier: MIT
// Sums of rows that peers cannot read: each rank pushes its rows to where their tokens' owners sum
// them.
#ifndef MSCCLPP_EP_CUDA_COMBINE_PUSH_HPP_
#define MSCCLPP_EP_CUDA_COMBINE_PUSH_HPP_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

// A landing area is memory of a rank that one other rank, its source, pushes rows to: the row of
// the owner's token of ordinal o among those that it sent to the source lands as row o. Weights
// likewise. Rows are pushed in chunks of a fixed number, each of which has two flags there: the
// first word of chunk c, rows c * chunkRows and so on, becomes the number of the epoch, all of its
// 64 bits, when the chunk's rows are there, and the second one when its weights are. So no flag is
// ever reset, none that is left from another epoch or is zero says anything, and flags of chunks
// without rows are not written. Memory of flags is zero at first, and is never used for anything
// else.

/// Rows of a chunk: so many that to flag them costs little, so few that the owner soon begins.
constexpr std::int64_t landingChunkRows(std::int64_t rowBytes) {
  constexpr std::int64_t kChunkBytes = 56 << 10;
  return std::clamp<std::int64_t>(kChunkBytes / std::max<std::int64_t>(rowBytes, 1), 1, 1024);
}

/// What a flag tells of: which word of its chunk it is.
enum class Landed : int { rows, weights, numFlags };

/// The word of a chunk's flag.
constexpr std::int64_t landingFlag(std::int64_t chunk, Landed what) {
  return chunk * static_cast<int>(Landed::numFlags) + static_cast<int>(what);
}

/// Chunks of up to `maxTokens` rows.
constexpr std::int64_t landingChunks(std::int64_t maxTokens, std::int64_t chunkRows) {
  return (maxTokens + chunkRows - 1) / chunkRows;
}

/// Their flags.
constexpr std::int64_t landingFlags(std::int64_t maxTokens, std::int64_t chunkRows) {
  return landingFlag(landingChunks(maxTokens, chunkRows), Landed::rows);
}

/// Bytes of all flags of a rank that has up to `maxTokens` tokens; each source's are
/// landingFlags() words.
constexpr std::size_t landingFlagBytes(int numRanks, std::int64_t maxTokens,
                                       std::int64_t chunkRows) {
  return static_cast<std::size_t>(numRanks) *
         static_cast<std::size_t>(landingFlags(maxTokens, chunkRows)) * sizeof(std::uint64_t);
}

/// Where this rank's rows of another rank's tokens are, and the landing area there for them.
struct LandingTarget {
  std::byte* rows = nullptr;
  float* weights = nullptr;  ///< null: none are pushed
  std::uint64_t* flags = nullptr;
  std::int64_t firstRow = 0;  ///< of the input, of that rank's first token
  std::int64_t numKept = 0;   ///< of its tokens
};

struct PushSumArguments {
  /// As for sumRows(), but for the sources: of this rank `rows` and `weights` are the input, from
  /// its first row; of each other one, this rank's landing area for it. The span tells which rows
  /// were dropped, there as here. Rows of landing areas are as aligned as the others.
  SumArguments sum;
  const std::byte* rows = nullptr;             ///< the input, which is pushed
  const float* weights = nullptr;              ///< [.., K] null: none are pushed
  PerRank<LandingTarget> targets;              ///< but this rank's own
  const std::int32_t* firstRowFrom = nullptr;  ///< [R] in place of those of the targets; or null
  const std::int32_t* numKeptFrom = nullptr;   ///< [R] likewise
  PerRank<const std::uint64_t*> flags;         ///< in this rank's memory, by source
  std::int64_t chunkRows = 1;          ///< landingChunkRows(), or another that all ranks use
  std::uint64_t* nextChunk = nullptr;  ///< in this rank's memory; 0 between kernels
};

/// Pushes this rank's rows, and sums those of its tokens as sumRows() does while they land. Ends
/// when all ranks are done with it.
void pushAndSumRows(const PushSumArguments& arguments, int numSms, cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_COMBINE_PUSH_HPP_
