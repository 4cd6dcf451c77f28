// SPDX-License-Identifier: MIT
// Which rows a rank pushes to which other, a few chunks at a time (combine_push.hpp).
#ifndef MSCCLPP_EP_CUDA_DEVICE_CHUNKS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_CHUNKS_CUH_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/combine_push.hpp"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

struct PushContext {
  const std::byte* rows = nullptr;
  const float* weights = nullptr;
  PerRank<LandingTarget> targets;
  const std::int32_t* firstRowFrom = nullptr;
  const std::int32_t* numKeptFrom = nullptr;
  std::int64_t chunkRows = 1;
  std::uint64_t* nextChunk = nullptr;
  std::int64_t rowBytes = 0;
  std::int64_t topk = 0;
  int rank = 0;
  int numRanks = 1;
  int drawers[static_cast<int>(Landed::numFlags)] = {};  ///< that draw tickets: for what
  int weightChunks = 1;                                  ///< of a ticket for weights
};

/// `rowDrawers` draw tickets for rows, `weightDrawers` for weights.
inline PushContext describePush(const PushSumArguments& arguments, std::int64_t rowBytes,
                                int rowDrawers, int weightDrawers) {
  // A warp raises the flags of as many chunks at once, which costs as much as to raise one.
  constexpr std::int64_t kWeightRows = 256;
  PushContext context;
  context.rows = arguments.rows;
  context.weights = arguments.weights;
  context.targets = arguments.targets;
  context.firstRowFrom = arguments.firstRowFrom;
  context.numKeptFrom = arguments.numKeptFrom;
  context.chunkRows = arguments.chunkRows;
  context.nextChunk = arguments.nextChunk;
  context.rowBytes = rowBytes;
  context.topk = arguments.sum.topk;
  context.rank = arguments.sum.order.rank;
  context.numRanks = arguments.sum.numRanks;
  context.drawers[static_cast<int>(Landed::rows)] = rowDrawers;
  context.drawers[static_cast<int>(Landed::weights)] = weightDrawers;
  context.weightChunks =
      static_cast<int>(std::clamp<std::int64_t>(kWeightRows / arguments.chunkRows, 1, kWarpSize));
  return context;
}

/// Some rows of this rank's, and where they go. None: there are no rows in the chunks.
struct Chunks {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t bytes = 0;
  std::uint64_t* flag = nullptr;  ///< of the first chunk
  int count = 0;
};

/// All that this rank pushes, rows or weights, by tickets: those of all peers for their first
/// tokens come first, and so on, as the peers sum tokens in this order.
template <Landed kWhat>
class PushPlan {
 public:
  /// Called by a warp.
  __device__ explicit PushPlan(const PushContext& push)
      : push_(push), rowsEach_(push.chunkRows * chunksEach()) {
    std::int64_t most = 0;
    for (int rank = laneIndex(); rank < push.numRanks; rank += kWarpSize) {
      if (rank == push.rank) continue;
      const std::int64_t count = (numKept(rank) + rowsEach_ - 1) / rowsEach_;
      most = count > most ? count : most;
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const std::int64_t other = __shfl_xor_sync(kAllLanes, most, distance);
      most = other > most ? other : most;
    }
    count_ = most * (push.numRanks - 1);
  }

  __device__ std::int64_t count() const { return count_; }

  /// Draws the next ticket of the rank; beyond the last, any that is not below count(), on which a
  /// drawer draws no more, and calls end(). Nobody waits for a ticket before it is looked at.
  __device__ std::int64_t draw() const {
    auto* next = reinterpret_cast<unsigned long long*>(push_.nextChunk);
    return static_cast<std::int64_t>(static_cast<std::uint32_t>(atomicAdd(next, kOne) / kOne));
  }

  /// The last drawer to end leaves its half of the counter as it was found.
  __device__ void end(std::int64_t ticket) const {
    auto* next = reinterpret_cast<unsigned long long*>(push_.nextChunk);
    const std::int64_t drawn = count_ + push_.drawers[static_cast<int>(kWhat)];
    if (ticket + 1 == drawn) atomicAdd(next, 0ULL - static_cast<unsigned long long>(drawn) * kOne);
  }

  __device__ Chunks operator[](std::int64_t ticket) const {
    const int others = push_.numRanks - 1;
    const std::int64_t index = ticket / others;
    // Ranks begin with different peers, so that none gets the rows of all at once.
    const int peer = (push_.rank + 1 + static_cast<int>(ticket - index * others)) % push_.numRanks;
    const LandingTarget& target = push_.targets[peer];
    const std::int64_t first = index * rowsEach_;
    const std::int64_t left = numKept(peer) - first;
    const std::int64_t numRows = left < rowsEach_ ? left : rowsEach_;
    Chunks chunks;
    if (numRows <= 0) return chunks;
    const std::int64_t from = firstRow(peer) + first;
    if constexpr (kWhat == Landed::rows) {
      chunks.from = push_.rows + from * push_.rowBytes;
      chunks.to = target.rows + first * push_.rowBytes;
      chunks.bytes = numRows * push_.rowBytes;
    } else {
      chunks.from = reinterpret_cast<const std::byte*>(push_.weights + from * push_.topk);
      chunks.to = reinterpret_cast<std::byte*>(target.weights + first * push_.topk);
      chunks.bytes = numRows * push_.topk * static_cast<std::int64_t>(sizeof(float));
    }
    chunks.flag = target.flags + landingFlag(index * chunksEach(), kWhat);
    chunks.count = static_cast<int>((numRows + push_.chunkRows - 1) / push_.chunkRows);
    return chunks;
  }

 private:
  /// The counter has a half for rows and one for weights.
  static constexpr unsigned long long kOne = kWhat == Landed::rows ? 1ULL : 1ULL << 32;

  __device__ int chunksEach() const { return kWhat == Landed::rows ? 1 : push_.weightChunks; }
  __device__ std::int64_t numKept(int rank) const {
    return push_.numKeptFrom != nullptr ? push_.numKeptFrom[rank] : push_.targets[rank].numKept;
  }
  __device__ std::int64_t firstRow(int rank) const {
    return push_.firstRowFrom != nullptr ? push_.firstRowFrom[rank] : push_.targets[rank].firstRow;
  }

  const PushContext& push_;
  const std::int64_t rowsEach_;
  std::int64_t count_ = 0;
};

/// Pushes weights for as long as there are tickets for them. They are few bytes and go first, so
/// that nobody has to wait for them beside rows. Called by a warp, one of the drawers.
__device__ inline void pushWeights(const PushContext& push, std::uint64_t epoch) {
  constexpr int kAhead = 8;
  const PushPlan<Landed::weights> plan(push);
  for (;;) {
    std::int64_t ticket = 0;
    if (laneIndex() == 0) ticket = plan.draw();
    ticket = __shfl_sync(kAllLanes, ticket, 0);
    if (ticket >= plan.count()) {
      if (laneIndex() == 0) plan.end(ticket);
      return;
    }
    const Chunks chunks = plan[ticket];
    const auto* from = reinterpret_cast<const float*>(chunks.from);
    auto* to = reinterpret_cast<float*>(chunks.to);
    const std::int64_t count = chunks.bytes / static_cast<std::int64_t>(sizeof(float));
    for (std::int64_t at = laneIndex(); at < count; at += kAhead * kWarpSize) {
      float values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (at + i * kWarpSize < count) values[i] = from[at + i * kWarpSize];
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (at + i * kWarpSize < count) to[at + i * kWarpSize] = values[i];
      }
    }
    __syncwarp();
    if (laneIndex() < chunks.count) {
      storeRelease(chunks.flag + landingFlag(laneIndex(), Landed::rows), epoch);
    }
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_CHUNKS_CUH_
