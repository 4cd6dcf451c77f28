// SPDX-License-Identifier: MIT
// Which rows a rank pushes to which other, a chunk at a time (combine_push.hpp).
#ifndef MSCCLPP_EP_CUDA_DEVICE_CHUNKS_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_CHUNKS_CUH_

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
  int pushers = 1;  ///< blocks that draw tickets
};

inline PushContext describePush(const PushSumArguments& arguments, std::int64_t rowBytes,
                                int pushers) {
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
  context.pushers = pushers;
  return context;
}

/// Some rows of this rank's, and where they go. None: there are no rows in the chunk.
struct Chunk {
  const std::byte* rows = nullptr;
  std::byte* to = nullptr;
  std::int64_t bytes = 0;
  const float* weights = nullptr;
  float* weightsTo = nullptr;  ///< null: none are pushed
  std::int64_t numWeights = 0;
  std::uint64_t* flag = nullptr;
};

/// All chunks that this rank pushes, by tickets: those of all peers for their first tokens come
/// first, and so on, as the peers sum tokens in this order.
class ChunkPlan {
 public:
  /// Called by a warp.
  __device__ explicit ChunkPlan(const PushContext& push) : push_(push) {
    std::int64_t most = 0;
    for (int rank = laneIndex(); rank < push.numRanks; rank += kWarpSize) {
      if (rank == push.rank) continue;
      const std::int64_t count = (numKept(rank) + push.chunkRows - 1) / push.chunkRows;
      most = count > most ? count : most;
    }
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      const std::int64_t other = __shfl_xor_sync(kAllLanes, most, distance);
      most = other > most ? other : most;
    }
    count_ = most * (push.numRanks - 1);
  }

  __device__ std::int64_t count() const { return count_; }

  /// Draws the next ticket of the rank; beyond the last, any that is not below count(). Each
  /// pushing block goes on until it has drawn one of these, once. The last of them leaves the
  /// counter as it was found.
  __device__ std::int64_t draw() const {
    auto* next = reinterpret_cast<unsigned long long*>(push_.nextChunk);
    const auto ticket = static_cast<std::int64_t>(atomicAdd(next, 1ULL));
    if (ticket == count_ + push_.pushers - 1) atomicExch(next, 0ULL);
    return ticket;
  }

  __device__ Chunk operator[](std::int64_t ticket) const {
    const int others = push_.numRanks - 1;
    const std::int64_t index = ticket / others;
    // Ranks begin with different peers, so that none gets the rows of all at once.
    const int peer = (push_.rank + 1 + static_cast<int>(ticket - index * others)) % push_.numRanks;
    const LandingTarget& target = push_.targets[peer];
    const std::int64_t first = index * push_.chunkRows;
    const std::int64_t left = numKept(peer) - first;
    const std::int64_t numRows = left < push_.chunkRows ? left : push_.chunkRows;
    Chunk chunk;
    if (numRows <= 0) return chunk;
    const std::int64_t from = firstRow(peer) + first;
    chunk.rows = push_.rows + from * push_.rowBytes;
    chunk.to = target.rows + first * push_.rowBytes;
    chunk.bytes = numRows * push_.rowBytes;
    if (push_.weights != nullptr && target.weights != nullptr) {
      chunk.weights = push_.weights + from * push_.topk;
      chunk.weightsTo = target.weights + first * push_.topk;
      chunk.numWeights = numRows * push_.topk;
    }
    chunk.flag = target.flags + index;
    return chunk;
  }

 private:
  __device__ std::int64_t numKept(int rank) const {
    return push_.numKeptFrom != nullptr ? push_.numKeptFrom[rank] : push_.targets[rank].numKept;
  }
  __device__ std::int64_t firstRow(int rank) const {
    return push_.firstRowFrom != nullptr ? push_.firstRowFrom[rank] : push_.targets[rank].firstRow;
  }

  const PushContext& push_;
  std::int64_t count_ = 0;
};

/// Called by some threads, each for its own.
__device__ __forceinline__ void pushWeights(const Chunk& chunk, int thread, int numThreads) {
  for (std::int64_t i = thread; i < chunk.numWeights; i += numThreads) {
    chunk.weightsTo[i] = chunk.weights[i];
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_CHUNKS_CUH_
