// SPDX-License-Identifier: MIT
// What the sum of a token is made of: how it is found, and how it is waited for.
#ifndef MSCCLPP_EP_CUDA_DEVICE_SUMMANDS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_SUMMANDS_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/combine_push.hpp"
#include "cuda/device/order.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

/// The rows that a token's sum is made of: of the biases, then of each rank.
struct Summands {
  const std::byte* biases[2] = {};  ///< the first `numBiases`
  int numBiases = 0;
  int numRanks = 0;
  const std::int32_t* head = nullptr;
  std::int64_t rowBytes = 0;

  __device__ int count() const { return numBiases + numRanks; }
};

/// Where the rows of other ranks are if those push them (combine_push.hpp): the source's row of
/// this rank's token of ordinal o is the landed row o.
struct Landing {
  PerRank<const std::uint64_t*> flags;  ///< of each source's chunks
  std::int32_t chunkRows = 1;
};

struct SumContext {
  Order order;
  PerRank<SumSource> sources;
  const std::int32_t* firstRows = nullptr;
  Landing landing;
  Summands rows;
  Summands weights;
  std::byte* out = nullptr;
  std::byte* outWeights = nullptr;
  std::int64_t topk = 0;
  float start = 0.0F;
};

inline SumContext describeSum(const SumArguments& arguments) {
  SumContext context;
  context.sources = arguments.sources;
  context.firstRows = arguments.firstRows;
  context.order = arguments.order;
  Summands& rows = context.rows;
  rows.numRanks = arguments.numRanks;
  rows.head = arguments.head;
  context.weights = rows;
  context.weights.rowBytes = arguments.topk * static_cast<std::int64_t>(sizeof(float));
  const bool isWide = arguments.dtype == DataType::float32;
  rows.rowBytes = arguments.hidden * (isWide ? Float32Element::kBytes : Bfloat16Element::kBytes);
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

/// One of those rows. Null: the token has no such.
struct Summand {
  const std::byte* row = nullptr;
  const std::uint64_t* flag = nullptr;  ///< says when it has landed; null: it is there
  int rank = -1;                        ///< whose it is; -1: a bias
};

/// The ordinal by which locate() finds a summand; negative if there is none.
__device__ __forceinline__ std::int32_t loadOrdinal(const Summands& summands, std::int64_t token,
                                                    int index) {
  if (index < summands.numBiases) return 0;
  if (index >= summands.count()) return -1;
  return summands.head[token * summands.numRanks + (index - summands.numBiases)];
}

template <bool kLanded, bool kWeights>
__device__ __forceinline__ Summand locate(const SumContext& context, std::int64_t token, int index,
                                          std::int32_t ordinal) {
  const Summands& summands = kWeights ? context.weights : context.rows;
  if (ordinal < 0) return {};
  if (index < summands.numBiases) {
    const std::byte* bias = index == 0 ? summands.biases[0] : summands.biases[1];
    return {bias + token * summands.rowBytes};
  }
  const int rank = index - summands.numBiases;
  const SumSource& source = context.sources[rank];
  const auto* rows = kWeights ? reinterpret_cast<const std::byte*>(source.weights) : source.rows;
  const std::int64_t row =
      (context.firstRows != nullptr ? context.firstRows[rank] : source.span.firstRow) + ordinal;
  if (rows == nullptr || row >= source.span.capacity) return {};
  if (!kLanded || rank == context.order.rank)
    return {rows + row * summands.rowBytes, nullptr, rank};
  const std::int64_t flag =
      landingFlag(ordinal / context.landing.chunkRows, kWeights ? Landed::weights : Landed::rows);
  return {rows + ordinal * summands.rowBytes, context.landing.flags[rank] + flag, rank};
}

__device__ __forceinline__ bool hasLanded(const Summand& summand, std::uint64_t epoch) {
  return summand.flag == nullptr || loadAcquire(summand.flag) == epoch;
}

/// Gives up on a summand: it may be that a rank has not come, for which whoever pushes waits, too.
static __device__ __noinline__ void failToLand(const Order& order, std::uint64_t epoch,
                                               Summand summand, bool aborted) {
  if (shrinks(order)) return giveUp(order, epoch, Word::landed, summand.rank, 0, aborted);
  for (int peer = 0; peer < order.numRanks; ++peer) {
    const std::uint64_t seen =
        loadAcquire(order.own + SignalMap(order.numRanks).at(Word::entered, peer));
    if (peer == order.rank || isOf(seen, epoch)) continue;
    return fail(order, epoch, Word::entered, peer, seen, aborted);
  }
  fail(order, epoch, Word::landed, summand.rank, loadAcquire(summand.flag), aborted);
}

/// Waits for a summand; false if it does not come.
__device__ inline bool awaitLanded(const Order& order, std::uint64_t epoch,
                                   const Summand& summand) {
  if (hasLanded(summand, epoch)) return true;
  Patience patience(order, epoch, summand.rank);
  while (!hasLanded(summand, epoch)) {
    if (patience.left() || hasLanded(summand, epoch)) continue;
    failToLand(order, epoch, summand, patience.aborted());
    return false;
  }
  return true;
}

/// Waits until the summands of `lanes` have landed. Returns all lanes whose have, or 0 if one of
/// those does not. Called by a warp.
__device__ inline unsigned awaitLanes(const Order& order, std::uint64_t epoch, const Summand& mine,
                                      unsigned lanes) {
  const auto look = [&] { return __ballot_sync(kAllLanes, hasLanded(mine, epoch)); };
  unsigned landed = look();
  if ((lanes & ~landed) == 0) return landed;
  Patience patience(order, epoch, mine.rank);
  while (((landed = look()) & lanes) != lanes) {
    const bool misses = ((lanes & ~landed) >> laneIndex() & 1u) != 0;
    const bool givesUp = !patience.left() && misses && !hasLanded(mine, epoch);
    if (!__any_sync(kAllLanes, givesUp)) continue;
    if (givesUp) failToLand(order, epoch, mine, patience.aborted());
    return 0;
  }
  return landed;
}

// Sums by plain loads.

/// Up to a warp's width of a token's summands, of which each lane has one.
struct Candidates {
  Summand mine;
  unsigned lanes = 0;  ///< that have one
};

template <bool kLanded, bool kWeights>
__device__ __forceinline__ Candidates findCandidates(const SumContext& context, std::int64_t token,
                                                     int base) {
  const int index = base + laneIndex();
  const Summands& summands = kWeights ? context.weights : context.rows;
  const Summand mine =
      locate<kLanded, kWeights>(context, token, index, loadOrdinal(summands, token, index));
  return {mine, __ballot_sync(kAllLanes, mine.row != nullptr)};
}

/// Waits for all summands of a token; false if one does not come. Called by a whole warp.
template <bool kWeights>
__device__ inline bool awaitToken(const SumContext& context, std::uint64_t epoch,
                                  std::int64_t token) {
  const Summands& summands = kWeights ? context.weights : context.rows;
  for (int base = 0; base < summands.count(); base += kWarpSize) {
    const Candidates found = findCandidates<true, kWeights>(context, token, base);
    if (awaitLanes(context.order, epoch, found.mine, kAllLanes) == 0) return false;
  }
  __syncwarp();
  return true;
}

/// Sums vectors `begin` to `end` - 1 of a token's rows. Called by a whole warp.
template <class Element, class Vector, bool kLanded, bool kWeights>
__device__ __forceinline__ void sumVectors(const SumContext& context, std::byte* out, float start,
                                           std::int64_t token, std::int64_t begin,
                                           std::int64_t end) {
  const Summands& summands = kWeights ? context.weights : context.rows;
  // Mostly they are all: then they are looked for once.
  const Candidates first = findCandidates<kLanded, kWeights>(context, token, 0);
  for (std::int64_t at = begin; at < end; at += kSumStep) {
    StepSum<Element, Vector> sum(start, at, end);
    sum.add(first.mine.row, first.lanes);
    for (int base = kWarpSize; base < summands.count(); base += kWarpSize) {
      const Candidates more = findCandidates<kLanded, kWeights>(context, token, base);
      sum.add(more.mine.row, more.lanes);
    }
    sum.store(out + token * summands.rowBytes, at, end);
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_SUMMANDS_CUH_
