// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_LOW_LATENCY_HPP_
#define MSCCLPP_EP_LOW_LATENCY_HPP_

#include <cstdint>
#include <memory>
#include <utility>

#include "mscclpp_ep/export.hpp"
#include "mscclpp_ep/tensor.hpp"

/// Low-latency operations: few tokens, received by expert, with room for the most that can come.
///
/// T tokens of this rank, M the most of any rank, H elements a token, K choices a token, R ranks,
/// E experts, L experts of this rank, S = ceil(H / 128) scales a token.
namespace mscclpp_ep {

struct LowLatencyState;
struct ReceiveState;

/// How a dispatch sends rows of bfloat16.
enum class Quantization : std::uint32_t {
  none = 0,           ///< as they are
  float8 = 1,         ///< e4m3, a float32 scale for each 128 elements
  float8Rounded = 2,  ///< the same, the scales being powers of two
  float8Ue8m0 = 3,    ///< likewise, of which the exponents are kept: four bytes to an int32
};

struct LowLatencyDispatchOptions {
  std::int64_t maxTokensPerRank = 0;  ///< M
  std::int64_t numExperts = 0;        ///< E
  Quantization quantization = Quantization::none;
};

struct LowLatencyDispatchInputs {
  TensorView x;            ///< [T, H], any dtype, bfloat16 if it is quantised; T <= M
  TensorView topkIdx;      ///< [T, K] int32 or int64, global ids, -1 for none
  TensorView topkWeights;  ///< [T, K] float32; optional: spares combine a step
};

/// Rows of expert e are x[e][0 … recvCount[e]), in order of (source rank, source token).
struct LowLatencyDispatchOutputs {
  TensorView x;            ///< [L, R * M, H] of x's dtype, or float8 e4m3
  TensorView scales;       ///< [L, R * M, S] float32, or [L, R * M, ceil(S / 4)] int32; any strides
  TensorView recvCount;    ///< [L] int32
  TensorView sourceIndex;  ///< [L, R * M] int32: the token of its source rank that each row is
  TensorView layoutRange;  ///< [L, R] int64: count, and first row << 32, of each source rank
  TensorView recvStats;    ///< [L] int32, to which counts are added; optional
  TensorView waitStats;    ///< [R] int64, to which nanoseconds of waiting are added; optional
};

struct LowLatencyCombineOptions {
  /// Sends each expert's row, so that all K are summed at once, as DeepEP does. Else a rank sends
  /// the weighted sum of its experts' rows of a token, rounded to x's dtype.
  bool exact = false;
  /// Rows travel in 10 bits an element, where their range allows.
  bool logfmt = false;
};

struct LowLatencyCombineInputs {
  TensorView x;            ///< [L, R * M, H] bfloat16, float16 or float32
  TensorView topkIdx;      ///< [T, K] as dispatch was given it
  TensorView topkWeights;  ///< [T, K] float32
};

struct LowLatencyCombineOutputs {
  TensorView x;          ///< [T, H] of x's dtype
  TensorView waitStats;  ///< [R] int64, to which nanoseconds of waiting are added; optional
};

/// What a low-latency dispatch leaves for the combine that undoes it. Copies share what they refer
/// to.
class MSCCLPP_EP_API LowLatencyHandle {
 public:
  LowLatencyHandle() = default;
  explicit LowLatencyHandle(std::shared_ptr<LowLatencyState> state) : state_(std::move(state)) {}
  explicit operator bool() const { return state_ != nullptr; }

  std::uint64_t epoch() const;  ///< number of the dispatch among low-latency operations

  const std::shared_ptr<LowLatencyState>& state() const { return state_; }

 private:
  std::shared_ptr<LowLatencyState> state_;
};

/// A low-latency operation that has sent and not yet received. Its tensors must live until then.
class MSCCLPP_EP_API PendingReceive {
 public:
  explicit PendingReceive(std::shared_ptr<ReceiveState> state);

  /// Of a dispatch: for the combine, once it is received.
  LowLatencyHandle handle() const;

  const std::shared_ptr<ReceiveState>& state() const { return state_; }

 private:
  std::shared_ptr<ReceiveState> state_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_LOW_LATENCY_HPP_
