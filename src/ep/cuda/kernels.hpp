// SPDX-License-Identifier: MIT
// What runs on the GPU: each function enqueues a kernel on a stream, and throws CudaError if that
// fails. Arrays are in the memory of the current device or of one that it can reach, but the
// arguments themselves, which are on the host.
#ifndef MSCCLPP_EP_CUDA_KERNELS_HPP_
#define MSCCLPP_EP_CUDA_KERNELS_HPP_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/packets.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep::cuda {

/// Which rank holds each expert, and as which of its own. [E] each.
struct PlacementArrays {
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

/// Where the rows for one rank go: the arrays of its outputs, from their first row.
struct PushTarget {
  std::byte* columns[kNumColumns] = {};  ///< null: there is no such array
  std::int64_t firstRow = 0;             ///< of the first of this rank's tokens there
  std::int64_t capacity = 0;             ///< rows at or beyond this are dropped
};

struct PushArguments {
  const std::byte* rows = nullptr;  ///< [T] of rowBytes
  std::int64_t rowBytes = 0;
  ScaleArray scales;
  TopkArrays topk;
  PlacementArrays placement;
  const std::int32_t* head = nullptr;  ///< [T, R] ordinal of a token among those sent to a rank, -1
  const PushTarget* targets = nullptr;  ///< [R]
  std::int64_t numTokens = 0;
  int numRanks = 0;
  /// Bytes to which every row, here and at all targets, is aligned: 16, 8, 4, 2 or 1.
  int rowAlignment = 1;
};

/// Writes each token's row, scales, choices (those of the receiver's experts by local id, else -1
/// and 0) and number to the ranks that it goes to: to row firstRow + head.
void pushRows(const PushArguments& arguments, int numSms, cudaStream_t stream);

/// The rows of one rank that are this rank's tokens.
struct SumSource {
  const std::byte* rows = nullptr;  ///< of the first token
  const float* weights = nullptr;   ///< likewise; null: none are summed
  std::int64_t count = 0;           ///< ordinals at or beyond this were dropped
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
  const SumSource* sources = nullptr;  ///< [R]
  std::int64_t numTokens = 0;
  int numRanks = 0;
  /// Bytes to which every row, of sources, biases and the output, is aligned.
  int rowAlignment = 1;
};

/// Sums the rows of each token: in float32, the biases first, then ranks in ascending order,
/// rounded once, NaNs canonical (core/numeric.hpp). A sum begins with +0, or with -0 if there are
/// two biases. Weights likewise, without biases.
void sumRows(const SumArguments& arguments, int numSms, cudaStream_t stream);

struct CountArguments {
  TopkArrays topk;                      ///< weights are not read
  const std::int32_t* owner = nullptr;  ///< [E]
  std::int64_t numTokens = 0;
  std::int64_t numExperts = 0;
  int numRanks = 0;
  std::int32_t* perRank = nullptr;    ///< [R], each token counted once a rank
  std::int32_t* perExpert = nullptr;  ///< [E], every choice counted
  std::uint8_t* inRank = nullptr;     ///< [T, R]
};

/// Fills the outputs of Buffer::getDispatchLayout. Ids are -1 to E - 1.
void countTokens(const CountArguments& arguments, cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_KERNELS_HPP_
