// SPDX-License-Identifier: MIT
// How a block numbers the tokens of a chunk among those that go to the same rank: it counts those
// before the chunk, and then goes on by steps, of whose tokens it makes a mask a rank.
#ifndef MSCCLPP_EP_CUDA_DEVICE_NUMBERING_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_NUMBERING_CUH_

#include <cstdint>

#include "cuda/device/warp.cuh"
#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

__device__ __forceinline__ int numThreads() { return static_cast<int>(blockDim.x); }

/// In shared memory: of each rank, and of each group of a step's tokens and rank.
struct Numbering {
  std::int32_t* next;    ///< [R] tokens counted so far
  std::uint32_t* masks;  ///< [groups, R] which tokens go there
  std::int32_t* first;   ///< [groups, R] ordinal of the first of these

  __device__ Numbering(std::int32_t* shared, int numRanks, int numGroups)
      : next(shared),
        masks(reinterpret_cast<std::uint32_t*>(shared + numRanks)),
        first(shared + numRanks + numGroups * numRanks) {}
};

/// Vectors that a thread loads before it looks at the first.
constexpr int kVectorsAhead = 8;
/// Counters of a byte hold what so many rounds count.
constexpr int kMostRounds = 255 / kVectorsAhead;

/// How many of a thread's bytes at 16 places, of each vector that it looked at, were not 0.
struct ByteCounts {
  std::uint32_t words[4] = {};

  __device__ __forceinline__ void add(const uint4& bytes) {
    words[0] += __vsetne4(bytes.x, 0);
    words[1] += __vsetne4(bytes.y, 0);
    words[2] += __vsetne4(bytes.z, 0);
    words[3] += __vsetne4(bytes.w, 0);
  }
  __device__ __forceinline__ bool any() const {
    return (words[0] | words[1] | words[2] | words[3]) != 0;
  }
  __device__ __forceinline__ int at(int place) const {
    return static_cast<int>(words[place / 4] >> (place % 4 * 8) & 0xFF);
  }
  /// That at an even place, and in the upper half the next one.
  __device__ __forceinline__ unsigned pairAt(int place) const {
    return static_cast<unsigned>(at(place) | at(place + 1) << 16);
  }
};

/// Adds to the ranks' counts what stands at their places. Called by whole warps. With a period of 1
/// all threads have the same ranks at the same places, and with any other few do.
__device__ inline void addCounts(const ByteCounts& counts, int numRanks, int period,
                                 std::int32_t* next) {
  constexpr int kPlaces = 16;
  if (!__any_sync(kAllLanes, counts.any())) return;
  if (period == 1) {
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kPlaces; i += 2) {
      // Two sums at a time, in halves of a word.
      const unsigned sums = __reduce_add_sync(kAllLanes, counts.pairAt(i));
      if (laneIndex() / 2 == i / 2)
        mine = static_cast<int>(laneIndex() % 2 == 0 ? sums & 0xFFFF : sums >> 16);
    }
    if (laneIndex() < kPlaces && mine != 0) atomicAdd(next + (laneIndex() & (numRanks - 1)), mine);
    return;
  }
  int rank = static_cast<int>(threadIdx.x) % period * kPlaces % numRanks;
#pragma unroll
  for (int i = 0; i < kPlaces; ++i) {
    if (counts.at(i) != 0) atomicAdd(next + rank, counts.at(i));
    if (++rank == numRanks) rank = 0;
  }
}

/// Counts the tokens before `end` that go to each rank, by vectors. A thread's vectors all begin
/// with the same rank. Called by whole blocks.
__device__ inline void countByVectors(const PlanArguments& plan, int period, std::int64_t end,
                                      std::int32_t* next) {
  const auto* in = reinterpret_cast<const uint4*>(plan.inRank);
  const std::int64_t count = end * plan.numRanks / static_cast<std::int64_t>(sizeof(uint4));
  const int step = numThreads() / period * period;
  std::int64_t at = static_cast<int>(threadIdx.x) < step ? threadIdx.x : count;
  // All threads of a block go round equally often.
  for (std::int64_t base = 0; base < count;) {
    ByteCounts counts;
    for (int round = 0; round < kMostRounds && base < count; ++round) {
      uint4 vectors[kVectorsAhead];
#pragma unroll
      for (int i = 0; i < kVectorsAhead; ++i) {
        const std::int64_t place = at + i * step;
        vectors[i] = place < count ? in[place] : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kVectorsAhead; ++i) counts.add(vectors[i]);
      at += kVectorsAhead * step;
      base += kVectorsAhead * step;
    }
    addCounts(counts, plan.numRanks, period, next);
  }
}

/// The same, byte by byte, of which a thread looks at those of one rank at a time.
__device__ inline void countByBytes(const PlanArguments& plan, std::int64_t end,
                                    std::int32_t* next) {
  const int width = min(plan.numRanks, numThreads());
  const int tokens = numThreads() / width;
  const int mine = static_cast<int>(threadIdx.x) / width;
  if (mine >= tokens) return;
  for (int rank = static_cast<int>(threadIdx.x) % width; rank < plan.numRanks; rank += width) {
    int count = 0;
#pragma unroll 8
    for (std::int64_t token = mine; token < end; token += tokens) {
      count += plan.inRank[token * plan.numRanks + rank] != 0 ? 1 : 0;
    }
    if (count != 0) atomicAdd(next + rank, count);
  }
}

/// Some tokens of a chunk, which begin with the first of a group.
struct Step {
  std::int64_t first = 0;
  int count = 0;

  __device__ int numGroups() const { return (count + kWarpSize - 1) / kWarpSize; }
};

/// Finds out which tokens of a step go where.
__device__ inline void findMasks(const PlanArguments& plan, const Step& step,
                                 const Numbering& numbering) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int items = step.numGroups() * plan.numRanks;
  for (int item = warp; item < items; item += numThreads() / kWarpSize) {
    const int group = item / plan.numRanks;
    const int rank = item - group * plan.numRanks;
    const int token = group * kWarpSize + laneIndex();
    const bool goes =
        token < step.count && plan.inRank[(step.first + token) * plan.numRanks + rank] != 0;
    const unsigned mask = __ballot_sync(kAllLanes, goes);
    if (laneIndex() == 0) numbering.masks[item] = mask;
  }
}

/// Finds the ordinals at which the groups begin.
__device__ inline void numberGroups(const PlanArguments& plan, const Step& step,
                                    const Numbering& numbering) {
  for (int rank = static_cast<int>(threadIdx.x); rank < plan.numRanks; rank += numThreads()) {
    std::int32_t next = numbering.next[rank];
    for (int group = 0; group < step.numGroups(); ++group) {
      const int at = group * plan.numRanks + rank;
      numbering.first[at] = next;
      next += __popc(numbering.masks[at]);
    }
    numbering.next[rank] = next;
  }
}

/// Goes over the pairs of a step's tokens and ranks.
class PairCursor {
 public:
  __device__ PairCursor(int numRanks, unsigned pair)
      : numRanks_(numRanks),
        token_(static_cast<int>(pair / static_cast<unsigned>(numRanks))),
        rank_(static_cast<int>(pair) - token_ * numRanks) {}

  __device__ std::int32_t head(const Numbering& numbering) const {
    const int at = token_ / kWarpSize * numRanks_ + rank_;
    const unsigned bit = 1U << (token_ % kWarpSize);
    const unsigned mask = numbering.masks[at];
    return (mask & bit) != 0 ? numbering.first[at] + __popc(mask & (bit - 1)) : -1;
  }
  __device__ void advance() {
    if (++rank_ < numRanks_) return;
    rank_ = 0;
    ++token_;
  }

 private:
  int numRanks_;
  int token_;
  int rank_;
};

/// Pairs whose heads a thread writes at a time.
constexpr int kPairs = 4;

/// Writes what is known of a step's tokens. Heads are in memory of the library's, which is aligned.
__device__ inline void writeHeads(const PlanArguments& plan, const Step& step,
                                  const Numbering& numbering) {
  const std::int64_t first = step.first * plan.numRanks;
  const auto pairs = static_cast<unsigned>(step.count * plan.numRanks);
  const bool aligned = reinterpret_cast<std::uintptr_t>(plan.inRank) % kPairs == 0;
  for (unsigned pair = threadIdx.x * kPairs; pair < pairs; pair += blockDim.x * kPairs) {
    const std::int64_t at = first + pair;
    std::int32_t heads[kPairs];
    PairCursor cursor(plan.numRanks, pair);
    const bool whole = pair + kPairs <= pairs;
#pragma unroll
    for (int i = 0; i < kPairs; ++i, cursor.advance()) {
      heads[i] = pair + i < pairs ? cursor.head(numbering) : -1;
    }
    if (whole && aligned) {
      const int4 vector = make_int4(heads[0], heads[1], heads[2], heads[3]);
      *reinterpret_cast<uchar4*>(plan.shownInRank + at) =
          *reinterpret_cast<const uchar4*>(plan.inRank + at);
      *reinterpret_cast<int4*>(plan.head + at) = vector;
      *reinterpret_cast<int4*>(plan.shownHead + at) = vector;
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (pair + i >= pairs) break;
      plan.shownInRank[at + i] = plan.inRank[at + i];
      plan.head[at + i] = heads[i];
      plan.shownHead[at + i] = heads[i];
    }
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_NUMBERING_CUH_
