// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_COLUMNS_HPP_
#define MSCCLPP_EP_CPU_COLUMNS_HPP_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/backend.hpp"
#include "core/packets.hpp"
#include "cpu/context.hpp"

namespace mscclpp_ep::cpu {

/// Rows of at least this many bytes are written past the caches: whoever reads them next is another
/// core, much later.
inline constexpr std::size_t kStreamedRowBytes = 1024;

/// How rows of a dtype that can be combined are summed.
SumType sumType(DataType dtype);

/// One array of a dispatch: what its rows are made from, here, and how long they are.
struct SourceColumn {
  const std::byte* data = nullptr;
  std::size_t rowBytes = 0;  ///< 0: this dispatch has no such array
  std::int64_t rowStride = 0;
  std::int64_t elementStride = 0;  ///< in bytes; the scales' are free
  std::size_t elementBytes = 0;
};

/// Writes the rows of one rank's tokens, wherever they go.
class RowWriter {
 public:
  RowWriter(const DispatchRequest& request, const Context& context);

  std::size_t rowBytes(int column) const {
    return columns_[static_cast<std::size_t>(column)].rowBytes;
  }

  /// Where the rows for one rank go.
  struct Target {
    int rank = 0;
    bool lands[kNumColumns] = {};  ///< in a ring of rows, to be copied out soon
    std::byte* columns[kNumColumns] = {};
    std::int64_t firstRow = 0;
    std::int64_t capacity = 0;
    std::int64_t ringRows = 1;

    /// Where the row of a token that is the `ordinal`th sent there goes.
    std::int64_t rowOf(int column, std::int64_t ordinal) const {
      return lands[column] ? ordinal % ringRows : firstRow + ordinal;
    }
  };

  /// Of a token's row and scales.
  std::uint64_t checksumOf(std::int64_t token) const;

  /// Writes row `ordinal` of those for `target`, made from `token`. In the integrity mode `sum` is
  /// checksumOf(token), which is the same for all targets.
  void write(const Target& target, std::int64_t token, std::int64_t ordinal,
             std::uint64_t sum) const;

 private:
  template <typename Index>
  struct Choice {
    Index id;
    float weight;
  };
  template <typename Index>
  Choice<Index> choiceFor(int rank, std::int64_t token, std::int64_t k) const;
  void copyRow(const Target& target, int column, std::int64_t token, std::int64_t ordinal) const;
  void writeScales(std::byte* out, std::int64_t token) const;
  template <typename Index>
  void writeTopk(const Target& target, std::int64_t token, std::int64_t ordinal) const;
  template <typename Index>
  std::uint64_t addTopk(std::uint64_t sum, int rank, std::int64_t token) const;
  void writeSeal(const Target& target, std::int64_t token, std::int64_t ordinal,
                 std::uint64_t sum) const;

  const Context& context_;
  const RowKernels& kernels_;
  const ExpertPlacement& placement_;
  std::int64_t topk_;
  bool wideIndex_;
  bool packedScales_;
  SourceColumn columns_[kNumColumns];
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_COLUMNS_HPP_
