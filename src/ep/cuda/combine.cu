// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>

#include "cuda/device/reduce.cuh"
#include "cuda/device/slices.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernels.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

/// The rows that a token's sum is made of: of the biases, then of each rank.
struct Summands {
  const std::byte* biases[2] = {};  ///< the first `numBiases`
  int numBiases = 0;
  int numRanks = 0;
  const SumSource* sources = nullptr;
  const std::int32_t* head = nullptr;
  std::int64_t rowBytes = 0;

  __device__ int count() const { return numBiases + numRanks; }
};

struct SumContext {
  Summands rows;
  Summands weights;
  std::byte* out = nullptr;
  std::byte* outWeights = nullptr;
  std::int64_t topk = 0;
  float start = 0.0F;
  Slices slices;
};

/// Up to a warp's width of a token's summands, of which each lane has one.
struct Candidates {
  const std::byte* mine = nullptr;
  unsigned lanes = 0;  ///< that have one
};

template <bool kWeights>
__device__ const std::byte* findSummand(const Summands& summands, std::int64_t token, int index) {
  if (index >= summands.count()) return nullptr;
  if (index < summands.numBiases) {
    const std::byte* bias = index == 0 ? summands.biases[0] : summands.biases[1];
    return bias + token * summands.rowBytes;
  }
  const int rank = index - summands.numBiases;
  const std::int32_t ordinal = summands.head[token * summands.numRanks + rank];
  const SumSource& source = summands.sources[rank];
  if (ordinal < 0 || ordinal >= source.count) return nullptr;
  const auto* rows = kWeights ? reinterpret_cast<const std::byte*>(source.weights) : source.rows;
  return rows == nullptr ? nullptr : rows + ordinal * summands.rowBytes;
}

template <bool kWeights>
__device__ Candidates findCandidates(const Summands& summands, std::int64_t token, int base) {
  const std::byte* mine = findSummand<kWeights>(summands, token, base + laneIndex());
  return {mine, __ballot_sync(kAllLanes, mine != nullptr)};
}

/// Sums vectors `begin` to `end` - 1 of a token's rows. Called by a whole warp.
template <class Element, class Vector, bool kWeights>
__device__ __forceinline__ void sumVectors(const Summands& summands, std::byte* out, float start,
                                           std::int64_t token, std::int64_t begin,
                                           std::int64_t end) {
  // Mostly they are all: then they are looked for once.
  const Candidates first = findCandidates<kWeights>(summands, token, 0);
  for (std::int64_t at = begin; at < end; at += kSumStep) {
    StepSum<Element, Vector> sum(start, at, end);
    sum.add(first.mine, first.lanes);
    for (int base = kWarpSize; base < summands.count(); base += kWarpSize) {
      const Candidates more = findCandidates<kWeights>(summands, token, base);
      sum.add(more.mine, more.lanes);
    }
    sum.store(out + token * summands.rowBytes, at, end);
  }
}

template <class Element, class Vector>
__global__ void __launch_bounds__(kBlockThreads, 1)
    sumKernel(const __grid_constant__ SumContext context) {
  for (SliceCursor slice(context.slices); slice.valid(); slice.advance()) {
    const std::int64_t token = slice.token();
    sumVectors<Element, Vector, false>(context.rows, context.out, context.start, token,
                                       slice.begin(), slice.end());
    if (context.outWeights != nullptr && slice.isFirstPart()) {
      sumVectors<Float32Element, Words<4>, true>(context.weights, context.outWeights, 0.0F, token,
                                                 0, context.topk);
    }
  }
}

SumContext describe(const SumArguments& arguments, std::int64_t elementBytes) {
  SumContext context;
  Summands& rows = context.rows;
  rows.numRanks = arguments.numRanks;
  rows.sources = arguments.sources;
  rows.head = arguments.head;
  context.weights = rows;
  context.weights.rowBytes = arguments.topk * static_cast<std::int64_t>(sizeof(float));
  rows.rowBytes = arguments.hidden * elementBytes;
  for (const std::byte* bias : {arguments.bias0, arguments.bias1}) {
    if (bias != nullptr) rows.biases[rows.numBiases++] = bias;
  }
  context.out = arguments.out;
  context.outWeights = reinterpret_cast<std::byte*>(arguments.outWeights);
  context.topk = arguments.topk;
  // With both biases there is no +0 in the sum, which shows if both are -0.
  context.start = rows.numBiases == 2 ? -0.0F : 0.0F;
  return context;
}

template <class Element, class Vector>
void launchSum(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  SumContext context = describe(arguments, Element::kBytes);
  const std::int64_t length = context.rows.rowBytes / Vector::kBytes;
  context.slices = cutRows(arguments.numTokens, length, kSumStep, kSumStep, numSms);
  const LaunchShape shape = shapeFor(context.slices, numSms);
  sumKernel<Element, Vector><<<shape.blocks, shape.threads, 0, stream>>>(context);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that sums rows");
}

template <class Element>
void sumRowsOf(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  constexpr int kBytes = Element::kBytes;
  switch (arguments.rowAlignment) {
    case 16:
      return launchSum<Element, Words<16>>(arguments, numSms, stream);
    case 8:
      return launchSum<Element, Words<8>>(arguments, numSms, stream);
    case 4:
      return launchSum<Element, Words<4>>(arguments, numSms, stream);
    default:
      return arguments.rowAlignment == kBytes
                 ? launchSum<Element, Words<kBytes>>(arguments, numSms, stream)
                 : launchSum<Element, Words<kBytes, false>>(arguments, numSms, stream);
  }
}

}  // namespace

void sumRows(const SumArguments& arguments, int numSms, cudaStream_t stream) {
  if (arguments.numTokens == 0) return;
  switch (arguments.dtype) {
    case DataType::bfloat16:
      return sumRowsOf<Bfloat16Element>(arguments, numSms, stream);
    case DataType::float16:
      return sumRowsOf<Float16Element>(arguments, numSms, stream);
    default:
      return sumRowsOf<Float32Element>(arguments, numSms, stream);
  }
}

}  // namespace mscclpp_ep::cuda
