// SPDX-License-Identifier: MIT
// What runs on the GPU: each function enqueues a kernel on a stream, and throws CudaError if that
// fails. Arrays are in the memory of the current device or of one that it can reach, but the
// arguments themselves, which are on the host.
#ifndef MSCCLPP_EP_CUDA_KERNELS_HPP_
#define MSCCLPP_EP_CUDA_KERNELS_HPP_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/packets.hpp"
#include "cuda/order.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep::cuda {

/// Which rank holds each expert, and as which of its own. [E] each.
struct PlacementArrays {
  std::int64_t numExperts = 0;
  const std::int32_t* owner = nullptr;
  const std::int32_t* localIndex = nullptr;
};

/// Choices of tokens: [T, K] int32 or int64, and float32.
struct TopkArrays {
  const void* ids = nullptr;  ///< null: no top-k
  const float* weights = nullptr;
  std::int64_t topk = 0;
  bool wide = false;  ///< ids are int64
};

/// Scales of tokens, whose strides are free. In bytes, but `perToken`.
struct ScaleArray {
  const std::byte* data = nullptr;  ///< null: no scales
  std::int64_t perToken = 0;
  std::int64_t tokenStride = 0;
  std::int64_t elementStride = 0;
  std::int64_t elementBytes = 0;
};

/// Something of each rank: of a few among a kernel's arguments, of more in device memory.
template <class T>
struct PerRank {
  static constexpr int kMost = 8;
  T few[kMost] = {};
  const T* many = nullptr;

  __host__ __device__ const T& operator[](int rank) const {
    return many != nullptr ? many[rank] : few[rank];
  }
};

/// A first row at which there is room for none: more than any capacity.
inline constexpr std::int32_t kNoPlace = std::numeric_limits<std::int32_t>::max();

/// Rows of one rank's outputs that are of another rank's tokens.
struct RowSpan {
  std::int64_t firstRow = 0;  ///< of the first token
  std::int64_t capacity = 0;  ///< rows at or beyond this are dropped
};

/// Where the rows for one rank go: the arrays of its outputs, from their first row.
struct PushTarget {
  std::byte* columns[kNumColumns] = {};  ///< null: there is no such array
  RowSpan span;                          ///< of this rank's tokens there
};

/// Results that are spoiled if the operation fails.
struct Poison {
  static constexpr int kMost = 4;
  std::byte* data[kMost] = {};  ///< set to 0xFF
  std::int64_t bytes[kMost] = {};
  std::int32_t* counts = nullptr;  ///< set to 0
  std::int64_t numCounts = 0;
};

/// Counts that the host has found out, and that the kernel brings to the GPU.
struct HostCounts {
  const std::int32_t* from = nullptr;  ///< in host memory; null: there are none
  std::int32_t* to = nullptr;
  std::int64_t count = 0;
};

struct PushArguments {
  const std::byte* rows = nullptr;  ///< [T] of rowBytes
  std::int64_t rowBytes = 0;
  ScaleArray scales;
  TopkArrays topk;
  PlacementArrays placement;
  const std::int32_t* head = nullptr;  ///< [T, R] ordinal of a token among those sent to a rank, -1
  const std::int32_t* sent = nullptr;  ///< [R] rows for each rank; null: no pace is kept
  PerRank<PushTarget> targets;
  const std::int32_t* firstRows = nullptr;  ///< [R] in place of those of the targets; or null
  std::int64_t numTokens = 0;
  int numRanks = 0;
  /// Bytes to which every row, here and at all targets, is aligned: 16, 8, 4, 2 or 1.
  int rowAlignment = 1;
  HostCounts hostCounts;
  Poison poison;
  Order order;
};

/// Writes each token's row, scales, choices (those of the receiver's experts by local id, else -1
/// and 0) and number to the ranks that it goes to: to row firstRow + head. Ends when all ranks have
/// written theirs here.
void pushRows(const PushArguments& arguments, int numSms, cudaStream_t stream);

/// The rows of one rank, some of which are this rank's tokens.
struct SumSource {
  const std::byte* rows = nullptr;  ///< from its first
  const float* weights = nullptr;   ///< likewise; null: none are summed
  RowSpan span;
};

struct SumArguments {
  std::byte* out = nullptr;             ///< [T, H]
  DataType dtype = DataType::bfloat16;  ///< or float16, float32
  std::int64_t hidden = 0;
  const std::byte* bias0 = nullptr;  ///< [T, H] or null
  const std::byte* bias1 = nullptr;
  float* outWeights = nullptr;  ///< [T, K] or null
  std::int64_t topk = 0;
  const std::int32_t* head = nullptr;  ///< [T, R]
  PerRank<SumSource> sources;
  const std::int32_t* firstRows = nullptr;  ///< [R] in place of those of the sources; or null
  std::int64_t numTokens = 0;
  int numRanks = 0;
  /// Bytes to which every row, of sources, biases and the output, is aligned.
  int rowAlignment = 1;
  Order order;
};

/// Sums the rows of each token: in float32, the biases first, then ranks in ascending order,
/// rounded once, NaNs canonical (core/numeric.hpp). A sum begins with +0, or with -0 if there are
/// two biases. Weights likewise, without biases. Ends when all ranks have read this one's rows.
void sumRows(const SumArguments& arguments, int numSms, cudaStream_t stream);

struct Notice;

struct CountArguments {
  TopkArrays topk;                      ///< weights are not read
  const std::int32_t* owner = nullptr;  ///< [E]
  std::int64_t numTokens = 0;
  std::int64_t numExperts = 0;
  int numRanks = 0;
  std::int32_t* perRank = nullptr;    ///< [R], each token counted once a rank
  std::int32_t* perExpert = nullptr;  ///< [E], every choice counted
  std::uint8_t* inRank = nullptr;     ///< [T, R]
  Notice* notice = nullptr;
};

/// Fills the outputs of Buffer::getDispatchLayout. Ids out of range are no choices, and noticed.
void countTokens(const CountArguments& arguments, cudaStream_t stream);

struct PlanArguments {
  const std::uint8_t* inRank = nullptr;  ///< [T, R]
  std::int64_t numTokens = 0;
  int numRanks = 0;
  TopkArrays topk;  ///< weights are not read
  PlacementArrays placement;
  const std::int32_t* perRank = nullptr;    ///< [R] as given
  const std::int32_t* perExpert = nullptr;  ///< [E] as given
  std::int32_t* head = nullptr;             ///< [T, R]
  std::int32_t* sent = nullptr;             ///< [R]
  std::int32_t* shownHead = nullptr;        ///< [T, R] once more
  std::uint8_t* shownInRank = nullptr;      ///< [T, R] a copy
  std::int32_t* scratch = nullptr;          ///< PlanReporter's; 0 between kernels
  std::uint64_t* report = nullptr;          ///< for a host that waits; null: none does
  PerRank<std::uint64_t*> boards;           ///< CountBoards::places() if `tellsAll`
  bool tellsAll = false;                    ///< the hosts of all ranks, what is given
  std::uint64_t epoch = 0;                  ///< of the operation, for them
  Notice* notice = nullptr;                 ///< for a host that looks later
  std::uint64_t ticket = 0;
};

/// The ordinals of tokens among those sent to each rank, and counts.
void planDispatch(const PlanArguments& arguments, cudaStream_t stream);

struct ExchangeArguments {
  const std::int32_t* sent = nullptr;       ///< [R]
  const std::int32_t* perExpert = nullptr;  ///< [E] as given to the dispatch
  PlacementArrays placement;
  std::int64_t numLocalExperts = 0;
  /// What each rank is told, in its memory: {rows, then counts per local expert of its} packets,
  /// [1 + its local experts].
  PerRank<std::uint64_t*> outgoing;
  std::uint64_t* incoming = nullptr;      ///< [R, 1 + L] likewise, of this rank
  std::int32_t* numRecv = nullptr;        ///< [1]
  std::int32_t* prefixMatrix = nullptr;   ///< [R, R]
  std::int32_t* channelPrefix = nullptr;  ///< [R]
  std::int32_t* received = nullptr;       ///< [L]
  std::int32_t* firstRows = nullptr;      ///< [R] of this rank's tokens at each receiver
  std::int32_t* firstRowFrom = nullptr;   ///< [R] of each sender's tokens here
  std::int32_t* numKeptFrom = nullptr;    ///< [R] rows of each sender here
  std::int64_t numRows = 0;               ///< that there is room for
  Notice* notice = nullptr;
  Order order;
};

/// Tells the other ranks how many rows they get, and learns how many come and where those of this
/// rank go. Part of the operation of the kernel after it, whose epoch it does not end.
void exchangeCounts(const ExchangeArguments& arguments, cudaStream_t stream);

struct MarkArguments {
  const std::int32_t* numRecv = nullptr;  ///< [1]
  std::int64_t numRows = 0;
  std::byte* topkIdx = nullptr;  ///< [numRows] of idBytes; set to 0xFF
  std::int64_t idBytes = 0;
  std::byte* topkWeights = nullptr;  ///< [numRows] of weightBytes; set to 0
  std::int64_t weightBytes = 0;
  std::int32_t* sourceIndex = nullptr;  ///< [numRows]; set to -1
};

/// Marks the rows that nobody sends.
void markMissingRows(const MarkArguments& arguments, cudaStream_t stream);

/// Writes values of the host's, which a graph keeps, too.
void storeValues(std::int32_t* out, const std::int32_t* values, std::int64_t count,
                 cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_KERNELS_HPP_
