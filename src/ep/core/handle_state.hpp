// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CORE_HANDLE_STATE_HPP_
#define MSCCLPP_EP_CORE_HANDLE_STATE_HPP_

#include <cstdint>
#include <memory>
#include <vector>

#include "core/layout.hpp"
#include "mscclpp_ep/handle.hpp"

namespace mscclpp_ep {

/// Whether elements of this type are bytes of something else, so that H says little.
constexpr bool isOpaque(DataType dtype) { return dtype < DataType::float16; }
static_assert(isOpaque(DataType::boolean) && isOpaque(DataType::int64));
static_assert(!isOpaque(DataType::float8E8m0));

/// What a DispatchHandle refers to. Never changes once made, so that any thread may read it.
struct HandleState {
  std::uint64_t bufferId = 0;  ///< unique in this process
  std::uint64_t epoch = 0;
  Layout layout = Layout::tokenMajor;

  // As a sender.
  std::int64_t numTokens = 0;
  std::int64_t hidden = 0;
  std::int64_t topk = -1;
  std::int64_t numExperts = 0;
  bool opaqueRows = false;  ///< dispatched as integers: H says nothing about a combine's
  std::shared_ptr<const SendPlan> plan;  ///< null: only the GPU has counts, here and below
  std::vector<std::int64_t> firstRowAt;  ///< [R] row of this rank's first token at each receiver
  std::vector<std::int64_t> capacityAt;  ///< [R] rows each receiver had room for
  Tensor sendHead;
  std::shared_ptr<const void> onGpu;  ///< what the backend for a GPU keeps of the routing
  Tensor isTokenInRank;

  // As a receiver.
  std::int64_t numRows = 0;
  std::vector<std::int64_t> firstRowFrom;  ///< [R]
  std::vector<std::int64_t> numRowsFrom;   ///< [R] before any were dropped
  std::vector<std::int32_t> rankPrefixSum;
  std::vector<std::int64_t> perExpert;
  Tensor sourceIndex;
  /// [N] what sourceIndex was, which callers may write to; in the integrity mode only.
  std::vector<std::int32_t> sourceTokens;
  std::shared_ptr<void> sourceTokensOnGpu;  ///< likewise, if they are there

  /// Of DispatchHandle; none on the CPU.
  HandleFields fields;

  /// Rows received; -1 if only the GPU knows.
  std::int64_t numRecv() const {
    if (plan == nullptr) return -1;
    return rankPrefixSum.empty() ? 0 : rankPrefixSum.back();
  }
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_HANDLE_STATE_HPP_
