// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_HANDLE_HPP_
#define MSCCLPP_EP_HANDLE_HPP_

#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "mscclpp_ep/export.hpp"
#include "mscclpp_ep/options.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {

struct HandleState;
struct PendingState;

/// Counts in the memory of the GPU, int32, for those who work on there. On the CPU there are none.
struct HandleFields {
  Tensor numRecvTokens;           ///< [1] rows received, also those that were dropped
  Tensor numRecvTokensPerExpert;  ///< [L] rows per local expert, not rounded
  Tensor rankPrefixMatrix;        ///< [R, R] column `rank`: recvRankPrefixSum(); -1 elsewhere
  Tensor numSendTokens;           ///< [R, 1]
  Tensor channelPrefix;           ///< [R, 1] zeros, as there is one channel
};

/// What a dispatch leaves for the combines that undo it and the dispatches that repeat it. A small
/// value: copies share what they refer to. It holds none of the rows that were received.
class MSCCLPP_EP_API DispatchHandle {
 public:
  DispatchHandle() = default;
  explicit DispatchHandle(std::shared_ptr<const HandleState> state) : state_(std::move(state)) {}
  explicit operator bool() const { return state_ != nullptr; }

  std::int64_t numTokens() const;  ///< T: tokens that this rank sent
  std::int64_t numRows() const;    ///< N: rows of the outputs
  /// Rows received; more than numRows() if some were dropped. -1 after a dispatch with
  /// numWorstTokens on a GPU, which the host does not wait for: then the counts below are empty,
  /// and fields() or Buffer::readCounts() have them.
  std::int64_t numRecvTokens() const;
  Layout layout() const;
  std::uint64_t epoch() const;  ///< number of the dispatch; the same on every rank

  /// [L] rows per local expert, not rounded.
  std::span<const std::int64_t> numRecvTokensPerExpert() const;
  /// [R] tokens sent to each rank.
  std::span<const std::int64_t> numSendTokens() const;
  /// [R] inclusive prefix sums of the rows received from ranks 0, 1, …
  std::span<const std::int32_t> recvRankPrefixSum() const;
  /// [numRows()] int32: token of its source rank that each row is; -1 in rows not received.
  const Tensor& recvSourceIndex() const;
  /// [T, R] int32: the ordinal of each token among those sent to each rank, or -1.
  const Tensor& sendHead() const;
  /// [T, R] bool, as dispatch was given it.
  const Tensor& isTokenInRank() const;

  const HandleFields& fields() const;

  const std::shared_ptr<const HandleState>& state() const { return state_; }

 private:
  std::shared_ptr<const HandleState> state_;
};

/// A dispatch between its two calls: counts are known, rows not yet sent. Letting it die unfinished
/// refuses the operation on every rank.
class MSCCLPP_EP_API PendingDispatch {
 public:
  explicit PendingDispatch(std::unique_ptr<PendingState> state);
  PendingDispatch(PendingDispatch&&) noexcept;
  PendingDispatch& operator=(PendingDispatch&&) noexcept;
  ~PendingDispatch();

  /// N: rows that the outputs must have; `numWorstTokens` if that was given.
  std::int64_t numRows() const;
  /// [L] rows per local expert, rounded up to `expertAlignment`; empty with `numWorstTokens`.
  std::span<const std::int64_t> numRecvTokensPerExpert() const;

  PendingState& state() const;  ///< throws InvalidArgument once the dispatch is finished

 private:
  std::unique_ptr<PendingState> state_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HANDLE_HPP_
