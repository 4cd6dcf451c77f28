// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_LANDING_HPP_
#define MSCCLPP_EP_CPU_LANDING_HPP_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/packets.hpp"
#include "cpu/context.hpp"

namespace mscclpp_ep::cpu {

/// An array that a dispatch fills, at the receiver.
struct OutputColumn {
  std::byte* data = nullptr;
  std::size_t rowBytes = 0;
  ArrayAddress address;  ///< of all rows, if they arrive in place
};

/// Rows that cannot arrive in place land in a ring of rows for each source rank, small enough to
/// stay in a cache, and are copied out while the rank sends rows of its own. The sender writes a
/// row of the ring again only when the receiver has raised that it has taken the one before.
class Landing {
 public:
  /// `numRowsFrom`, `firstRowFrom`: of the rows that are kept.
  Landing(Context& context, std::vector<std::int64_t> numRowsFrom,
          std::vector<std::int64_t> firstRowFrom);

  /// Takes a landing block for the columns that need one. Throws as Arena::landing().
  void bind(const OutputColumn (&columns)[kNumColumns], std::int64_t numRows);

  bool used() const { return used_; }
  std::int64_t ringRows(std::size_t rank) const { return ringRows_[rank]; }
  /// Where `rank` writes a column.
  ArrayAddress address(int column, std::size_t rank) const;

  /// Copies out what has landed, and says so to those that sent it. True when all rows have come.
  bool takeArrived();

 private:
  void copyOut(std::size_t rank, std::int64_t begin, std::int64_t end);
  void copyRows(std::size_t rank, std::int64_t begin, std::int64_t end) const;

  Context& context_;
  const std::vector<std::int64_t> numRowsFrom_;
  const std::vector<std::int64_t> firstRowFrom_;
  std::vector<std::int64_t> ringRows_;
  std::vector<std::int64_t> ringBegin_;  ///< first row of each ring in the landing block
  std::vector<std::int64_t> taken_;
  OutputColumn columns_[kNumColumns];
  ArenaBlock block_;
  std::uint64_t offsets_[kNumColumns] = {};
  bool used_ = false;
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_LANDING_HPP_
