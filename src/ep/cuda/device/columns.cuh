// SPDX-License-Identifier: MIT
// What the kernels that push rows have in common: where a token's row goes, and the small columns
// that go with it.
#ifndef MSCCLPP_EP_CUDA_DEVICE_COLUMNS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_COLUMNS_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/device/warp.cuh"
#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

/// A rank that tokens go to.
class Receiver {
 public:
  __device__ __forceinline__ Receiver(const PushArguments& push, int rank)
      : target_(push.targets[rank]),
        head_(push.head + rank),
        numRanks_(push.numRanks),
        firstRow_(push.firstRows != nullptr ? push.firstRows[rank] : target_.span.firstRow) {}

  /// Of a token among those sent to it; -1 if it is not.
  __device__ __forceinline__ std::int32_t ordinalOf(std::int64_t token) const {
    return head_[token * numRanks_];
  }
  /// Row of its outputs that a token of an ordinal goes to; negative if none, or without room.
  __device__ __forceinline__ std::int64_t rowAt(std::int32_t ordinal) const {
    const std::int64_t row = firstRow_ + ordinal;
    return ordinal >= 0 && row < target_.span.capacity ? row : -1;
  }
  __device__ __forceinline__ std::int64_t rowOf(std::int64_t token) const {
    return rowAt(ordinalOf(token));
  }

  /// From its first row; null if it has no such array.
  __device__ __forceinline__ std::byte* column(Column column) const {
    return target_.columns[column];
  }

 private:
  const PushTarget& target_;
  const std::int32_t* head_;
  std::int64_t numRanks_;
  std::int64_t firstRow_;
};

/// Consecutive tokens, whose columns a warp writes at one receiver. Their rows there are
/// consecutive, so that what the warp writes at a time are whole lines of memory: on a link, a few
/// bytes cost as much as a line.
struct TokenRun {
  static constexpr int kMost = 16;

  std::int64_t first = 0;
  int count = 0;
  std::int64_t myRow = -1;  ///< of token first + lane; negative beyond `count`, too
};

/// What a lane loads before it stores the first of it.
inline constexpr int kElementsAhead = 4;

/// Stores, for each token of a run that goes to the receiver, `perToken` elements, which `load`
/// gets by token and number. `store` gets an element's place in the receiver's array.
template <class Load, class Store>
__device__ __forceinline__ void pushElements(const TokenRun& run, std::int64_t perToken,
                                             const Load& load, const Store& store) {
  static_assert(TokenRun::kMost < kWarpSize);  // the last lane has no row, ever
  const auto width = static_cast<unsigned>(perToken);
  const unsigned count = static_cast<unsigned>(run.count) * width;
  for (unsigned begin = 0; begin < count; begin += kElementsAhead * kWarpSize) {
    decltype(load(std::int64_t{}, 0U)) elements[kElementsAhead];
    std::int64_t places[kElementsAhead];
#pragma unroll
    for (int i = 0; i < kElementsAhead; ++i) {
      const unsigned at = begin + i * kWarpSize + laneIndex();
      const unsigned token = at < count ? at / width : kWarpSize - 1;
      const std::int64_t row = __shfl_sync(kAllLanes, run.myRow, static_cast<int>(token));
      const unsigned element = at - token * width;
      places[i] = row < 0 ? -1 : row * perToken + element;
      if (row >= 0) elements[i] = load(run.first + token, element);
    }
#pragma unroll
    for (int i = 0; i < kElementsAhead; ++i) {
      if (places[i] >= 0) store(places[i], elements[i]);
    }
  }
}

/// Scales as `perToken` units that are `stride` bytes apart.
template <class Unit>
__device__ __forceinline__ void pushScaleUnits(const ScaleArray& scales, const TokenRun& run,
                                               std::byte* out, std::int64_t perToken,
                                               std::int64_t stride) {
  pushElements(
      run, perToken,
      [&](std::int64_t token, unsigned i) {
        return *reinterpret_cast<const Unit*>(scales.data + token * scales.tokenStride +
                                              i * stride);
      },
      [&](std::int64_t place, Unit unit) { reinterpret_cast<Unit*>(out)[place] = unit; });
}

/// Whether scales can be moved by whole vectors.
template <class Unit>
__device__ __forceinline__ bool consistOf(const ScaleArray& scales, const std::byte* out) {
  const auto places = reinterpret_cast<std::uintptr_t>(scales.data) |
                      reinterpret_cast<std::uintptr_t>(out) |
                      static_cast<std::uintptr_t>(scales.tokenStride) |
                      static_cast<std::uintptr_t>(scales.perToken * scales.elementBytes);
  return scales.elementStride == scales.elementBytes && places % sizeof(Unit) == 0;
}

__device__ inline void pushScales(const ScaleArray& scales, const TokenRun& run, std::byte* out) {
  if (scales.data == nullptr || out == nullptr) return;
  if (consistOf<uint4>(scales, out)) {
    const std::int64_t units = scales.perToken * scales.elementBytes / 16;
    return pushScaleUnits<uint4>(scales, run, out, units, 16);
  }
  switch (scales.elementBytes) {
    case 4:
      return pushScaleUnits<std::uint32_t>(scales, run, out, scales.perToken, scales.elementStride);
    case 2:
      return pushScaleUnits<std::uint16_t>(scales, run, out, scales.perToken, scales.elementStride);
    default:
      return pushScaleUnits<std::uint8_t>(scales, run, out, scales.perToken, scales.elementStride);
  }
}

/// A choice of a token as a receiver sees it: of an expert of its own, or of none.
struct Choice {
  std::int32_t localIndex = -1;
  float weight = 0.0F;
};

template <class Index>
__device__ __forceinline__ Choice loadChoice(const PushArguments& push, int rank, std::int64_t at) {
  const Index id = static_cast<const Index*>(push.topk.ids)[at];
  // Where no host has waited for the plan, ids out of range come here: they are no choices.
  if (id < 0 || id >= push.placement.numExperts || push.placement.owner[id] != rank) return {};
  const float weight = push.topk.weights != nullptr ? push.topk.weights[at] : 0.0F;
  return {push.placement.localIndex[id], weight};
}

/// A receiver gets the choices that are its own, by local id.
template <class Index>
__device__ __forceinline__ void pushChoices(const PushArguments& push, const TokenRun& run,
                                            const Receiver& receiver, int rank) {
  auto* ids = reinterpret_cast<Index*>(receiver.column(kTopkIdx));
  auto* weights = reinterpret_cast<float*>(receiver.column(kTopkWeights));
  pushElements(
      run, push.topk.topk,
      [&](std::int64_t token, unsigned k) {
        return loadChoice<Index>(push, rank, token * push.topk.topk + k);
      },
      [&](std::int64_t place, const Choice& choice) {
        if (ids != nullptr) ids[place] = choice.localIndex;
        if (weights != nullptr) weights[place] = choice.weight;
      });
}

__device__ __forceinline__ void pushSourceIndex(const TokenRun& run, std::byte* out) {
  if (out == nullptr || run.myRow < 0) return;
  reinterpret_cast<std::int32_t*>(out)[run.myRow] =
      static_cast<std::int32_t>(run.first + laneIndex());
}

__device__ inline void pushRun(const PushArguments& push, std::int64_t first, int rank) {
  const Receiver receiver(push, rank);
  const std::int64_t left = push.numTokens - first;
  TokenRun run;
  run.first = first;
  run.count = static_cast<int>(left < TokenRun::kMost ? left : TokenRun::kMost);
  if (laneIndex() < run.count) run.myRow = receiver.rowOf(first + laneIndex());
  if (__all_sync(kAllLanes, run.myRow < 0)) return;
  pushSourceIndex(run, receiver.column(kSourceIndex));
  if (push.topk.ids != nullptr) {
    push.topk.wide ? pushChoices<std::int64_t>(push, run, receiver, rank)
                   : pushChoices<std::int32_t>(push, run, receiver, rank);
  }
  pushScales(push.scales, run, receiver.column(kScales));
}

/// Writes all columns but the rows. Called by whole warps, of which this is one of `numWarps`.
/// `awaitTurn` is called before each part of what goes to peers, with the fraction of it before.
template <class AwaitTurn>
__device__ __forceinline__ void pushColumns(const PushArguments& push, int warp, int numWarps,
                                            const AwaitTurn& awaitTurn) {
  const std::int64_t runs = (push.numTokens + TokenRun::kMost - 1) / TokenRun::kMost;
  // Each sender begins with itself, and goes on with a receiver of its own.
  for (std::int64_t at = warp; at < runs * push.numRanks; at += numWarps) {
    if (at >= runs) {
      awaitTurn(static_cast<float>(at - runs) / static_cast<float>(runs * (push.numRanks - 1)));
    }
    const auto rank = static_cast<int>((push.order.rank + at / runs) % push.numRanks);
    pushRun(push, at % runs * TokenRun::kMost, rank);
  }
}

/// Called by some threads, of which this is one of `numThreads`. Each waits for the host's memory
/// once for several counts.
__device__ inline void bringCounts(const HostCounts& counts, int thread, int numThreads) {
  constexpr int kAhead = 4;
  if (counts.from == nullptr) return;
  const auto* from = reinterpret_cast<const volatile std::int32_t*>(counts.from);
  for (std::int64_t first = thread; first < counts.count; first += kAhead * numThreads) {
    std::int32_t values[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int64_t at = first + i * numThreads;
      values[i] = at < counts.count ? from[at] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const std::int64_t at = first + i * numThreads;
      if (at < counts.count) counts.to[at] = values[i];
    }
  }
}

/// Marks results as those of an operation that failed.
__device__ inline void poison(const Poison& results) {
  for (int i = 0; i < Poison::kMost; ++i) {
    for (std::int64_t at = threadIdx.x; at < results.bytes[i]; at += blockDim.x) {
      results.data[i][at] = std::byte{0xFF};
    }
  }
  for (std::int64_t at = threadIdx.x; at < results.numCounts; at += blockDim.x) {
    results.counts[at] = 0;
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_COLUMNS_CUH_
