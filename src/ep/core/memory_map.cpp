// SPDX-License-Identifier: MIT
#include "core/memory_map.hpp"

#include <bit>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

// More than any address space, and far enough from 2^64 for sums of a few.
constexpr std::size_t kMostBytes = std::size_t{1} << 56;

}  // namespace

std::size_t arrayBytes(std::int64_t rows, std::size_t rowBytes) {
  std::size_t bytes = 0;
  const bool overflow = __builtin_mul_overflow(static_cast<std::size_t>(rows), rowBytes, &bytes);
  EP_EXPECTS(rows >= 0 && !overflow && bytes <= kMostBytes, rows, " rows of ", rowBytes,
             " bytes were asked for; no memory is that large");
  return bytes;
}

std::size_t blockBytes(std::size_t wanted) {
  EP_EXPECTS(wanted <= kMostBytes, wanted, " bytes were asked for; no memory is that large");
  if (wanted <= kPage) return kPage;
  const std::size_t step = std::max(std::bit_floor(wanted) / 4, kPage);
  return alignUp(wanted, step);
}

LandingMap landingMap(std::int64_t rows, const std::int64_t (&rowBytes)[kNumColumns]) {
  LandingMap map;
  for (int column = 0; column < kNumColumns; ++column) {
    map.offset[column] = map.bytes;
    map.bytes += alignUp(arrayBytes(rows, static_cast<std::size_t>(rowBytes[column])), kPage);
  }
  return map;
}

std::int64_t dispatchBytes(std::int64_t rows, const RowShape& shape) {
  EP_EXPECTS(rows >= 0, "rows is ", rows, "; it must not be negative");
  EP_EXPECTS(
      shape.rowBytes >= 0 && shape.scaleBytes >= 0 && shape.topk >= 0 && shape.indexBytes >= 0,
      "the sizes of a row must not be negative");
  std::size_t total = 0;
  for (const std::int64_t bytes :
       {shape.rowBytes, shape.scaleBytes, shape.topk * shape.indexBytes,
        shape.topk * std::int64_t{sizeof(float)}, std::int64_t{sizeof(std::int32_t)}}) {
    if (bytes > 0) total += blockBytes(arrayBytes(rows, static_cast<std::size_t>(bytes)));
  }
  return static_cast<std::int64_t>(total);
}

std::int64_t bufferBytes(std::int64_t rows, const RowShape& shape, std::int64_t resultsAlive) {
  EP_EXPECTS(resultsAlive >= 0, "resultsAlive is ", resultsAlive, "; it must not be negative");
  return dispatchBytes(rows, shape) * (resultsAlive + 1);
}

std::int64_t controlBytes(int numRanks) {
  EP_EXPECTS(numRanks > 0, "numRanks is ", numRanks, "; it must be at least 1");
  return static_cast<std::int64_t>(ControlMap(numRanks).bytes());
}

}  // namespace mscclpp_ep
