// SPDX-License-Identifier: MIT
// Sums of rows that bulk copies bring into shared memory: one warp of a block loads, others sum.
#ifndef MSCCLPP_EP_CUDA_DEVICE_BULK_SUM_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_BULK_SUM_CUH_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/device/summands.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

// A block has pipes, each of a warp that loads and some that sum, as one alone has more latencies
// than it can hide. Then come other warps, of which these are only there if there are weights.
inline constexpr int kPipes = 2;
inline constexpr int kSumWarps = 8;
inline constexpr int kLoadWarps = 2;
inline constexpr int kPipeWarps = kLoadWarps + kSumWarps;
inline constexpr int kWeightWarps = 3;
inline constexpr int kSumThreads = kSumWarps * kWarpSize;

/// What a thread sums at a time: as much as fits into its registers.
inline constexpr int kPartVectors = 4;
inline constexpr std::int64_t kVectorBytes = 16;
/// A row is done in parts that are so long at most.
inline constexpr std::int64_t kMostPartBytes = kSumThreads * kPartVectors * kVectorBytes;
/// Rows are not cut into shorter ones for the sake of more blocks.
inline constexpr std::int64_t kLeastPartBytes = 2048;
/// Of which parts, but the last of a row, are multiples.
inline constexpr std::int64_t kPartGranule = 128;
inline constexpr int kMostStages = 32;

/// The rows of all tokens, cut into parts. An item is one part of one token; items of a token are
/// next to each other.
struct RowParts {
  std::int64_t numItems = 0;
  std::int64_t perRow = 1;
  std::int64_t partBytes = 0;
  std::int64_t rowBytes = 0;
};

struct Part {
  std::int64_t token = 0;
  std::int64_t offset = 0;  ///< in the row
  std::uint32_t bytes = 0;

  __device__ static Part of(const RowParts& parts, std::int64_t item) {
    Part part{item, 0, static_cast<std::uint32_t>(parts.rowBytes)};
    if (parts.perRow == 1) return part;
    part.token = item / parts.perRow;
    part.offset = (item - part.token * parts.perRow) * parts.partBytes;
    const std::int64_t left = parts.rowBytes - part.offset;
    part.bytes = static_cast<std::uint32_t>(left < parts.partBytes ? left : parts.partBytes);
    return part;
  }
};

inline std::int64_t divideUp(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

/// At least one item for each of `blocks`, if parts do not get too short by that.
inline RowParts cutIntoParts(std::int64_t numTokens, std::int64_t rowBytes, std::int64_t blocks) {
  const std::int64_t least = divideUp(rowBytes, kMostPartBytes);
  const std::int64_t most = std::max(divideUp(rowBytes, kLeastPartBytes), least);
  const std::int64_t wanted = divideUp(blocks, std::max<std::int64_t>(numTokens, 1));
  const std::int64_t length = divideUp(rowBytes, std::clamp(wanted, least, most));
  RowParts parts;
  parts.rowBytes = rowBytes;
  parts.partBytes = divideUp(length, kPartGranule) * kPartGranule;
  parts.perRow = divideUp(rowBytes, parts.partBytes);
  parts.numItems = numTokens * parts.perRow;
  return parts;
}

/// Some of the items: every `step`th.
struct ItemRange {
  std::int64_t first = 0;
  std::int64_t step = 1;
  std::int64_t count = 0;

  __device__ static ItemRange of(std::int64_t numItems, std::int64_t first, std::int64_t step) {
    return {first, step, first < numItems ? (numItems - first + step - 1) / step : 0};
  }
  __device__ std::int64_t operator[](std::int64_t i) const { return first + i * step; }
};

struct BulkSum {
  SumContext context;
  RowParts parts;
  int pipes = kPipes;
  int loaders = kLoadWarps;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Rows on their way from the warp that loads to those that sum.
struct SumRing {
  RingBarriers<kMostStages> barriers;
  /// Of which of the block's items the row is, as a number from 0 on. Their number: there are no
  /// more rows.
  std::int64_t items[kMostStages];

  __device__ void init(int numStages) { barriers.init(numStages, kSumWarps); }
};

/// Goes over the summands of the block's items in the order of their summation, a warp's width at a
/// time, of which each lane has one.
class SummandScan {
 public:
  __device__ SummandScan(const BulkSum& sum, const ItemRange& items)
      : sum_(sum), items_(items), count_(sum.context.rows.count()) {
    item_ = laneIndex() / count_;
    index_ = laneIndex() % count_;
    prefetch();
  }

  /// Whether any lane has one still.
  __device__ bool more() const { return __any_sync(kAllLanes, item_ < items_.count); }
  /// This lane's summand and its item; goes on to the next.
  template <bool kLanded>
  __device__ Summand take(std::int64_t& item, Part& part) {
    item = item_;
    part = part_;
    const Summand found = locate<kLanded, false>(sum_.context, part_.token, index_, ordinal_);
    item_ += kWarpSize / count_;
    index_ += kWarpSize % count_;
    if (index_ >= count_) {
      index_ -= count_;
      ++item_;
    }
    prefetch();
    return found;
  }

 private:
  /// What is in memory of the summand, ahead of the time when it is needed.
  __device__ void prefetch() {
    ordinal_ = -1;
    if (item_ >= items_.count) return;
    part_ = Part::of(sum_.parts, items_[item_]);
    ordinal_ = loadOrdinal(sum_.context.rows, part_.token, index_);
  }

  const BulkSum& sum_;
  const ItemRange& items_;
  const int count_;
  std::int64_t item_;
  int index_;
  Part part_;
  std::int32_t ordinal_;
};

/// Loads the rows of the pipe's items: as the `loader`th of those that take turns. With `kLanded`,
/// does not wait for rows any more once one has not come. Called by a warp, whose first lane issues
/// all loads.
template <bool kLanded>
__device__ void loadSummands(const BulkSum& sum, const ItemRange& items, std::uint64_t epoch,
                             SumRing& ring, std::byte* stages, int loader) {
  RingPosition at(ring.barriers.size);
  int turn = 0;
  bool waits = kLanded;
  fenceGlobalProxy();
  for (SummandScan scan(sum, items); scan.more();) {
    std::int64_t item = 0;
    Part part;
    const Summand mine = scan.template take<kLanded>(item, part);
    unsigned landed = waits ? 0 : kAllLanes;
    for (unsigned lanes = __ballot_sync(kAllLanes, mine.row != nullptr); lanes != 0;
         at.advance()) {
      const int lane = takeLowest(lanes);
      const bool isMine = turn == loader;
      if (++turn == sum.loaders) turn = 0;
      if (!isMine) continue;
      if (kLanded && (landed >> lane & 1u) == 0) {
        landed = awaitLanes(sum.context.order, epoch, mine, 1u << lane);
        waits = landed != 0;
        if (!waits) landed = kAllLanes;
        __syncwarp();
        fenceGlobalProxy();
      }
      const std::byte* from = broadcast(mine.row + part.offset, lane);
      const std::uint32_t bytes = __shfl_sync(kAllLanes, part.bytes, lane);
      const std::int64_t itsItem = __shfl_sync(kAllLanes, item, lane);
      if (laneIndex() == 0) {
        // Those that summed what was here have read it; what follows cannot overtake that.
        ring.barriers.awaitEmpty(at);
        ring.items[at.place()] = itsItem;
        arriveExpecting(&ring.barriers.full[at.place()], bytes);
        bulkLoad(stages + at.place() * sum.parts.partBytes, from, bytes,
                 &ring.barriers.full[at.place()]);
      }
      __syncwarp();
    }
  }
  if (laneIndex() == 0 && turn == loader) {
    ring.barriers.awaitEmpty(at);
    ring.items[at.place()] = items.count;
    arrive(&ring.barriers.full[at.place()]);
  }
}

/// The sum of a part, of which each of the summing threads has some vectors.
template <class Element>
struct PartSum {
  using Vector = Words<kVectorBytes>;
  VectorSum<Element, Vector> vectors[kPartVectors];

  __device__ __forceinline__ void fill(float start) {
#pragma unroll
    for (int i = 0; i < kPartVectors; ++i) vectors[i].fill(start);
  }

  __device__ __forceinline__ void add(const std::byte* shared, std::uint32_t bytes, int thread) {
    Vector loaded[kPartVectors];
#pragma unroll
    for (int i = 0; i < kPartVectors; ++i) {
      const std::uint32_t at = (i * kSumThreads + thread) * kVectorBytes;
      if (at < bytes) loaded[i].loadShared(shared + at);
    }
#pragma unroll
    for (int i = 0; i < kPartVectors; ++i) {
      const std::uint32_t at = (i * kSumThreads + thread) * kVectorBytes;
      if (at < bytes) vectors[i].add(loaded[i]);
    }
  }

  __device__ __forceinline__ void store(std::byte* out, std::uint32_t bytes, int thread) const {
#pragma unroll
    for (int i = 0; i < kPartVectors; ++i) {
      const std::uint32_t at = (i * kSumThreads + thread) * kVectorBytes;
      if (at < bytes) vectors[i].store(out + at);
    }
  }
};

/// Sums what the loading warp brings, and writes the sums, also of items that have no rows. Called
/// by all summing warps.
template <class Element>
__device__ void sumParts(const BulkSum& sum, const ItemRange& items, SumRing& ring,
                         const std::byte* stages, int thread) {
  if (items.count == 0) return;
  RingPosition at(ring.barriers.size);
  PartSum<Element> result;
  result.fill(sum.context.start);
  std::int64_t current = 0;
  Part part = Part::of(sum.parts, items[0]);
  for (;;) {
    ring.barriers.awaitFull(at);
    const std::int64_t item = ring.items[at.place()];
    while (current < item) {
      result.store(sum.context.out + part.token * sum.parts.rowBytes + part.offset, part.bytes,
                   thread);
      if (++current == items.count) return;
      part = Part::of(sum.parts, items[current]);
      result.fill(sum.context.start);
    }
    result.add(stages + at.place() * sum.parts.partBytes, part.bytes, thread);
    __syncwarp();
    if (laneIndex() == 0) arrive(&ring.barriers.empty[at.place()]);
    at.advance();
  }
}

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

/// Does what the `warp`th of the warps of all pipes does.
template <class Element, bool kLanded>
__device__ void runPipe(const BulkSum& sum, std::int64_t block, std::int64_t blocks,
                        std::uint64_t epoch, SumRing* rings, std::byte* stages, int warp) {
  const int pipe = warp / kPipeWarps;
  SumRing& ring = rings[pipe];
  const ItemRange items =
      ItemRange::of(sum.parts.numItems, block + pipe * blocks, blocks * sum.pipes);
  std::byte* mine = stages + pipe * ring.barriers.size * sum.parts.partBytes;
  const int role = warp - pipe * kPipeWarps;
  if (role >= kLoadWarps) {
    return sumParts<Element>(sum, items, ring, mine, (role - kLoadWarps) * kWarpSize + laneIndex());
  }
  if (role < sum.loaders) loadSummands<kLanded>(sum, items, epoch, ring, mine, role);
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

#endif

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_BULK_SUM_CUH_
