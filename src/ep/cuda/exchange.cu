// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>

#include "core/layout.hpp"
#include "cuda/device/order.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernel_list.hpp"
#include "cuda/kernels.hpp"
#include "cuda/plan_report.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constexpr int kThreads = 1024;

/// Whether a rank has no part in it: also one that was masked when a graph was captured.
__device__ bool isAbsent(const ExchangeArguments& exchange, int rank) {
  return isLost(exchange.order, rank) || exchange.outgoing[rank] == nullptr;
}

__device__ void sendCounts(const ExchangeArguments& exchange, std::uint64_t epoch) {
  for (int rank = threadIdx.x; rank < exchange.order.numRanks; rank += blockDim.x) {
    if (!isAbsent(exchange, rank)) {
      storeRelaxed(exchange.outgoing[rank], packCount(exchange.sent[rank], epoch));
    }
  }
  for (std::int64_t e = threadIdx.x; e < exchange.placement.numExperts; e += blockDim.x) {
    const std::int32_t owner = exchange.placement.owner[e];
    if (isAbsent(exchange, owner)) continue;
    std::uint64_t* counts = exchange.outgoing[owner] + 1;
    storeRelaxed(counts + exchange.placement.localIndex[e],
                 packCount(exchange.perExpert[e], epoch));
  }
}

/// Waits for a count of a rank's; -1 if it does not come. One that is lost has none.
__device__ std::int32_t awaitCount(const ExchangeArguments& exchange, std::uint64_t epoch, int rank,
                                   std::int64_t which) {
  const std::uint64_t* place = exchange.incoming + rank * (1 + exchange.numLocalExperts) + which;
  if (isAbsent(exchange, rank)) return 0;
  Patience patience(exchange.order, epoch, rank);
  std::uint64_t seen = loadRelaxed(place);
  while (!isOf(seen, epoch)) {
    const bool left = patience.left();
    seen = loadRelaxed(place);
    if (left || isOf(seen, epoch)) continue;
    giveUp(exchange.order, epoch, Word::firstRow, rank, seen, patience.aborted());
    return isLost(exchange.order, rank) ? 0 : -1;
  }
  return static_cast<std::int32_t>(signalCount(seen));
}

/// Where ranks may be lost: waits for all counts before any is used, so that all of a rank's count,
/// or none. False if one does not come that is not lost by that. Called by the whole block.
__device__ bool awaitCounts(const ExchangeArguments& exchange, std::uint64_t epoch) {
  const std::int64_t each = 1 + exchange.numLocalExperts;
  bool came = true;
  for (std::int64_t i = threadIdx.x; i < exchange.order.numRanks * each; i += blockDim.x) {
    came = awaitCount(exchange, epoch, static_cast<int>(i / each), i % each) >= 0 && came;
  }
  return __syncthreads_and(came) != 0;
}

/// Sums the counts of each local expert. Called by all threads but those of the first warp.
__device__ bool receiveCounts(const ExchangeArguments& exchange, std::uint64_t epoch) {
  bool came = true;
  for (std::int64_t e = threadIdx.x - kWarpSize; e < exchange.numLocalExperts;
       e += blockDim.x - kWarpSize) {
    std::int32_t sum = 0;
    for (int rank = 0; rank < exchange.order.numRanks && came; ++rank) {
      const std::int32_t count = awaitCount(exchange, epoch, rank, 1 + e);
      came = count >= 0;
      sum += count;
    }
    exchange.received[e] = came ? sum : 0;
  }
  return came;
}

/// The sum of the values of the lanes up to this one.
__device__ std::int32_t inclusiveSum(std::int32_t value) {
  for (int step = 1; step < kWarpSize; step *= 2) {
    const std::int32_t other = __shfl_up_sync(kAllLanes, value, step);
    if (laneIndex() >= step) value += other;
  }
  return value;
}

/// Places the rows of `rank` behind those before, of which the last is row `end` - 1, and tells it.
__device__ void placeRows(const ExchangeArguments& exchange, std::uint64_t epoch, int rank,
                          std::int32_t rows, std::int32_t end) {
  const Order& order = exchange.order;
  const std::int32_t first = end - rows;
  if (rank == order.rank) {
    exchange.firstRows[rank] = first;
  } else if (!isAbsent(exchange, rank)) {
    // All that there is to tell is in the word.
    storeRelaxed(order.peers[rank] + SignalMap(order.numRanks).at(Word::firstRow, order.rank),
                 packCount(first, epoch));
  }
  exchange.prefixMatrix[rank * order.numRanks + order.rank] = end;
  exchange.firstRowFrom[rank] = first;
  exchange.numKeptFrom[rank] = static_cast<std::int32_t>(rowsKept(first, rows, exchange.numRows));
}

__device__ void noteDropped(const ExchangeArguments& exchange, std::int32_t numRecv) {
  *exchange.numRecv = numRecv;
  if (numRecv <= exchange.numRows) return;
  exchange.notice->numRecv = numRecv;
  exchange.notice->numRows = exchange.numRows;
  exchange.notice->dropped = 1;
}

/// Learns how many rows come from each rank, and tells the ranks where theirs begin. Called by a
/// warp.
__device__ bool receiveRows(const ExchangeArguments& exchange, std::uint64_t epoch) {
  const int ranks = exchange.order.numRanks;
  std::int32_t before = 0;
  for (int base = 0; base < ranks; base += kWarpSize) {
    const int rank = base + laneIndex();
    const std::int32_t rows = rank < ranks ? awaitCount(exchange, epoch, rank, 0) : 0;
    if (!__all_sync(kAllLanes, rows >= 0)) return false;
    const std::int32_t end = before + inclusiveSum(rows);
    if (rank < ranks) placeRows(exchange, epoch, rank, rows, end);
    before = __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
  if (laneIndex() == 0) noteDropped(exchange, before);
  return true;
}

/// Learns where the rows of this rank go. Called by a warp.
__device__ bool receivePlaces(const ExchangeArguments& exchange, std::uint64_t epoch) {
  const Order& order = exchange.order;
  bool came = true;
  for (int rank = laneIndex(); rank < order.numRanks; rank += kWarpSize) {
    if (rank == order.rank) continue;
    const std::uint64_t word =
        isAbsent(exchange, rank) ? 0 : awaitWord(order, epoch, Word::firstRow, rank);
    came = came && (word != 0 || isAbsent(exchange, rank));
    exchange.firstRows[rank] = word != 0 ? static_cast<std::int32_t>(signalCount(word)) : kNoPlace;
  }
  return came;
}

/// The memory has been something else, some of which may look like a packet.
__device__ void clearIncoming(const ExchangeArguments& exchange) {
  const std::int64_t count = exchange.order.numRanks * (1 + exchange.numLocalExperts);
  for (std::int64_t i = threadIdx.x; i < count; i += blockDim.x) exchange.incoming[i] = 0;
  __syncthreads();
}

__device__ void fillShown(const ExchangeArguments& exchange) {
  const int ranks = exchange.order.numRanks;
  for (int i = threadIdx.x; i < ranks * ranks; i += blockDim.x) {
    if (i % ranks != exchange.order.rank) exchange.prefixMatrix[i] = -1;
  }
  for (int i = threadIdx.x; i < ranks; i += blockDim.x) exchange.channelPrefix[i] = 0;
}

/// Nothing came: an operation that has failed.
__device__ void fillNone(const ExchangeArguments& exchange) {
  for (std::int64_t e = threadIdx.x; e < exchange.numLocalExperts; e += blockDim.x) {
    exchange.received[e] = 0;
  }
  for (int rank = threadIdx.x; rank < exchange.order.numRanks; rank += blockDim.x) {
    exchange.numKeptFrom[rank] = 0;
    exchange.firstRowFrom[rank] = 0;
    exchange.firstRows[rank] = 0;
    exchange.prefixMatrix[rank * exchange.order.numRanks + exchange.order.rank] = 0;
  }
  if (threadIdx.x == 0) *exchange.numRecv = 0;
}

__global__ void __launch_bounds__(kThreads)
    exchangeKernel(const __grid_constant__ ExchangeArguments exchange) {
  clearIncoming(exchange);
  fillShown(exchange);
  if (!enterPeers(exchange.order)) return fillNone(exchange);
  const std::uint64_t epoch = currentEpoch(exchange.order);
  sendCounts(exchange, epoch);
  if (shrinks(exchange.order) && !awaitCounts(exchange, epoch)) return fillNone(exchange);
  const bool firstWarp = threadIdx.x < kWarpSize;
  bool came = firstWarp ? receiveRows(exchange, epoch) : receiveCounts(exchange, epoch);
  // A rank that is lost from here on has been counted by all threads.
  if (shrinks(exchange.order)) __syncthreads();
  if (firstWarp) came = came && receivePlaces(exchange, epoch);
  if (__syncthreads_and(came) == 0) fillNone(exchange);
}

__device__ void fillBytes(std::byte* out, std::int64_t begin, std::int64_t end, std::byte value) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  const std::int64_t me = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  // Numbers of 4 bytes, one of which a thread writes.
  for (std::int64_t at = begin + me * 4; at < end; at += step * 4) {
    const auto word = static_cast<std::uint32_t>(value) * 0x01010101U;
    *reinterpret_cast<std::uint32_t*>(out + at) = word;
  }
}

__global__ void __launch_bounds__(kThreads) markKernel(const __grid_constant__ MarkArguments mark) {
  const std::int64_t from = *mark.numRecv < mark.numRows ? *mark.numRecv : mark.numRows;
  fillBytes(mark.topkIdx, from * mark.idBytes, mark.numRows * mark.idBytes, std::byte{0xFF});
  fillBytes(mark.topkWeights, from * mark.weightBytes, mark.numRows * mark.weightBytes,
            std::byte{0});
  fillBytes(reinterpret_cast<std::byte*>(mark.sourceIndex), from * 4, mark.numRows * 4,
            std::byte{0xFF});
}

/// What fits into the arguments of a kernel.
struct Values {
  static constexpr int kMost = 960;
  std::int32_t values[kMost];
};

__global__ void storeKernel(std::int32_t* out, const __grid_constant__ Values values, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = values.values[i];
}

}  // namespace

void exchangeCounts(const ExchangeArguments& arguments, cudaStream_t stream) {
  EP_LIST_KERNEL(exchangeKernel);
  exchangeKernel<<<1, kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that exchanges counts");
}

void markMissingRows(const MarkArguments& arguments, cudaStream_t stream) {
  constexpr unsigned kBlocks = 8;
  EP_LIST_KERNEL(markKernel);
  markKernel<<<kBlocks, kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that marks rows");
}

void storeValues(std::int32_t* out, const std::int32_t* values, std::int64_t count,
                 cudaStream_t stream) {
  for (std::int64_t done = 0; done < count; done += Values::kMost) {
    Values part{};
    const auto now = static_cast<int>(count - done < Values::kMost ? count - done : Values::kMost);
    for (int i = 0; i < now; ++i) part.values[i] = values[done + i];
    EP_LIST_KERNEL(storeKernel);
    storeKernel<<<1, 256, 0, stream>>>(out + done, part, now);
    EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that stores values");
  }
}

}  // namespace mscclpp_ep::cuda
