// SPDX-License-Identifier: MIT
// How rows that bulk copies bring are cut into parts, and the parts shared out.
#ifndef MSCCLPP_EP_CUDA_DEVICE_ROW_PARTS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_ROW_PARTS_CUH_

#include <algorithm>
#include <cstdint>

#include "core/layout.hpp"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

/// Warps that sum a part together.
inline constexpr int kSumWarps = 8;
inline constexpr int kSumThreads = kSumWarps * kWarpSize;

/// What a thread sums at a time: as much as fits into its registers.
inline constexpr int kPartVectors = 4;
inline constexpr std::int64_t kVectorBytes = 16;
/// A row is done in parts that are so long at most.
inline constexpr std::int64_t kMostPartBytes = kSumThreads * kPartVectors * kVectorBytes;
/// Rows are not cut into shorter ones for the sake of more blocks.
inline constexpr std::int64_t kLeastPartBytes = 2048;
/// Of which parts, but the last of a row, are multiples.
inline constexpr std::int64_t kPartGranule = 128;

/// The rows of all tokens, cut into parts. An item is one part of one token; items of a token are
/// next to each other.
struct RowParts {
  std::int64_t numItems = 0;
  std::int64_t perRow = 1;
  std::int64_t partBytes = 0;
  std::int64_t rowBytes = 0;
};

struct Part {
  std::int64_t token = 0;
  std::int64_t offset = 0;  ///< in the row
  std::uint32_t bytes = 0;

  __device__ static Part of(const RowParts& parts, std::int64_t item) {
    Part part{item, 0, static_cast<std::uint32_t>(parts.rowBytes)};
    if (parts.perRow == 1) return part;
    part.token = item / parts.perRow;
    part.offset = (item - part.token * parts.perRow) * parts.partBytes;
    const std::int64_t left = parts.rowBytes - part.offset;
    part.bytes = static_cast<std::uint32_t>(left < parts.partBytes ? left : parts.partBytes);
    return part;
  }
};

/// At least one item for each of `blocks`, if parts do not get too short by that.
inline RowParts cutIntoParts(std::int64_t numTokens, std::int64_t rowBytes, std::int64_t blocks) {
  const std::int64_t least = divideUp(rowBytes, kMostPartBytes);
  const std::int64_t most = std::max(divideUp(rowBytes, kLeastPartBytes), least);
  const std::int64_t wanted = divideUp(blocks, std::max<std::int64_t>(numTokens, 1));
  const std::int64_t length = divideUp(rowBytes, std::clamp(wanted, least, most));
  RowParts parts;
  parts.rowBytes = rowBytes;
  parts.partBytes = roundUp(length, kPartGranule);
  parts.perRow = divideUp(rowBytes, parts.partBytes);
  parts.numItems = numTokens * parts.perRow;
  return parts;
}

/// Some of the items: every `step`th.
struct ItemRange {
  std::int64_t first = 0;
  std::int64_t step = 1;
  std::int64_t count = 0;

  __device__ static ItemRange of(std::int64_t numItems, std::int64_t first, std::int64_t step) {
    return {first, step, first < numItems ? (numItems - first + step - 1) / step : 0};
  }
  __device__ std::int64_t operator[](std::int64_t i) const { return first + i * step; }
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_ROW_PARTS_CUH_
