// SPDX-License-Identifier: MIT
// Sums of weights beside those of rows, by warps of their own.
#ifndef MSCCLPP_EP_CUDA_DEVICE_SUM_WEIGHTS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_SUM_WEIGHTS_CUH_

#include <cstdint>

#include "cuda/device/reduce.cuh"
#include "cuda/device/row_parts.cuh"
#include "cuda/device/summands.cuh"

namespace mscclpp_ep::cuda {

inline constexpr int kWeightWarps = 2;

/// Sums the weights of a token for one expert choice; false if some do not come.
template <bool kLanded>
__device__ bool sumWeight(const SumContext& context, std::uint64_t epoch, std::int64_t token,
                          std::int64_t k) {
  constexpr int kAhead = 4;
  const Summands& summands = context.weights;
  float sum = 0.0F;
  for (int base = 0; base < summands.numRanks; base += kAhead) {
    std::int32_t ordinals[kAhead];
    Summand found[kAhead];
    float values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ordinals[i] = loadOrdinal(summands, token, base + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      found[i] = locate<kLanded, true>(context, token, base + i, ordinals[i]);
      if (kLanded && !awaitLanded(context.order, epoch, found[i])) return false;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (found[i].row != nullptr) {
        values[i] = __ldcs(reinterpret_cast<const float*>(found[i].row) + k);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (found[i].row != nullptr) sum += values[i];
    }
  }
  const std::uint32_t bits = Float32Element::round(sum);
  reinterpret_cast<std::uint32_t*>(context.outWeights)[token * context.topk + k] = bits;
  return true;
}

/// Sums the weights of the block's tokens. Called by some threads, each for its own.
template <bool kLanded>
__device__ void sumWeights(const SumContext& context, const ItemRange& tokens, std::uint64_t epoch,
                           int thread, int numThreads) {
  const std::int64_t topk = context.topk;
  for (std::int64_t i = thread; i < tokens.count * topk; i += numThreads) {
    const std::int64_t which = i / topk;
    if (!sumWeight<kLanded>(context, epoch, tokens[which], i - which * topk)) return;
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_SUM_WEIGHTS_CUH_
