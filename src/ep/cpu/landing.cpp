// SPDX-License-Identifier: MIT
#include "cpu/landing.hpp"

#include <algorithm>

#include "core/check.hpp"
#include "core/layout.hpp"
#include "core/memory_map.hpp"

namespace mscclpp_ep::cpu {

namespace {

// A megabyte fits the second-level cache of two cores: larger rings go through memory, and in
// smaller ones ranks wait for each other. Measured with rows of 14 KiB between two ranks.
constexpr std::size_t kRingBytes = std::size_t{1} << 20;
constexpr std::int64_t kRowsPerPart = 16;

}  // namespace

Landing::Landing(Context& context, std::vector<std::int64_t> numRowsFrom,
                 std::vector<std::int64_t> firstRowFrom)
    : context_(context),
      numRowsFrom_(std::move(numRowsFrom)),
      firstRowFrom_(std::move(firstRowFrom)),
      ringRows_(numRowsFrom_.size(), 1),
      taken_(numRowsFrom_.size()) {}

void Landing::bind(const OutputColumn (&columns)[kNumColumns], std::int64_t numRows) {
  std::int64_t rowBytes[kNumColumns] = {};
  std::size_t longest = 1;
  for (int column = 0; column < kNumColumns; ++column) {
    columns_[column] = columns[column];
    const bool lands =
        columns[column].data != nullptr && columns[column].address.access == Access::landing;
    if (!lands) continue;
    used_ = true;
    rowBytes[column] = static_cast<std::int64_t>(columns[column].rowBytes);
    longest = std::max(longest, columns[column].rowBytes);
  }
  if (!used_) return;
  const auto most = static_cast<std::int64_t>(std::max<std::size_t>(kRingBytes / longest, 1)) *
                    context_.workers.numThreads();
  for (std::size_t rank = 0; rank < ringRows_.size(); ++rank) {
    ringRows_[rank] = std::clamp<std::int64_t>(numRowsFrom_[rank], 1, most);
  }
  ringBegin_ = exclusivePrefixSum(ringRows_);
  const LandingMap map = landingMap(ringBegin_.back() + ringRows_.back(), rowBytes);
  // The block is as large as the operation all the same, so that its limit does not depend on how
  // rows are distributed, and the combine that follows finds room for as many.
  block_ = context_.arena.landing(std::max(landingMap(numRows, rowBytes).bytes, map.bytes));
  std::copy(std::begin(map.offset), std::end(map.offset), std::begin(offsets_));
}

ArrayAddress Landing::address(int column, std::size_t rank) const {
  const OutputColumn& output = columns_[column];
  if (output.address.access != Access::landing) return output.address;
  ArrayAddress address = block_.address;
  address.offset +=
      offsets_[column] + static_cast<std::uint64_t>(ringBegin_[rank]) * output.rowBytes;
  return address;
}

bool Landing::takeArrived() {
  bool all = true;
  for (std::size_t rank = 0; rank < taken_.size(); ++rank) {
    const int peer = static_cast<int>(rank);
    if (peer == context_.rank()) continue;
    if (context_.masked(rank)) continue;
    const std::int64_t arrived = context_.raised(kRowsPushed, peer);
    if (arrived > numRowsFrom_[rank]) {
      throw PeerFailure(cat("rank ", rank, " sent ", arrived, " rows after it had announced ",
                            numRowsFrom_[rank]));
    }
    all = all && arrived >= numRowsFrom_[rank];
    if (!used_ || arrived <= taken_[rank]) continue;
    copyOut(rank, taken_[rank], arrived);
    taken_[rank] = arrived;
    context_.raise(kRowsTaken, peer, arrived);
  }
  return all;
}

/// Rows `begin` to `end` of those from a rank, which are in its ring.
void Landing::copyOut(std::size_t rank, std::int64_t begin, std::int64_t end) {
  const TraceScope scope(context_.trace, "copy out");
  const std::int64_t ring = ringRows_[rank];
  context_.workers.run(end - begin, kRowsPerPart, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t row = begin + from; row < begin + to;) {
      const std::int64_t stop = std::min(begin + to, row + ring - row % ring);
      copyRows(rank, row, stop);
      row = stop;
    }
  });
}

/// Rows that lie behind each other in the ring.
void Landing::copyRows(std::size_t rank, std::int64_t begin, std::int64_t end) const {
  for (int column = 0; column < kNumColumns; ++column) {
    const OutputColumn& output = columns_[column];
    if (output.data == nullptr || output.address.access != Access::landing) continue;
    const auto in = static_cast<std::size_t>(ringBegin_[rank] + begin % ringRows_[rank]);
    const auto out = static_cast<std::size_t>(firstRowFrom_[rank] + begin);
    context_.kernels.streamCopy(output.data + out * output.rowBytes,
                                block_.data.get() + offsets_[column] + in * output.rowBytes,
                                static_cast<std::size_t>(end - begin) * output.rowBytes);
  }
}

}  // namespace mscclpp_ep::cpu
