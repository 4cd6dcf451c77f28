// SPDX-License-Identifier: MIT
// How the warps of a kernel come to memory of peers, and are done with it, each for itself: so they
// can do what needs no peer before, and after. See order.cuh for kernels that wait as a whole.
#ifndef MSCCLPP_EP_CUDA_DEVICE_VISIT_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_VISIT_CUH_

#include <cstdint>

#include "core/packets.hpp"
#include "cuda/device/order.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

/// Order::blocksDone counts blocks, and in units of this the parts of finishPart().
inline constexpr unsigned kOnePart = 1U << 16;

/// Begins such a kernel: tells the peers that this rank's memory is ready. Returns the epoch; 0,
/// for the whole block, if the buffer has failed. Called by whole blocks, all of them.
__device__ inline std::uint64_t beginVisit(const Order& order) {
  constexpr int kTellingWarp = 4;  ///< that has nothing else to do yet; all such kernels have it
  const bool tells = blockIdx.x == 0 && threadIdx.x / kWarpSize == kTellingWarp;
  // What is needed from memory comes at once, and while the fence waits.
  const int first = laneIndex();
  std::uint64_t* words = tells && first < order.numRanks ? order.peers[first] : nullptr;
  const std::uint64_t epoch = currentEpoch(order);
  if (tells) {
    fenceSystem();
    for (int peer = first; epoch != 0 && peer < order.numRanks; peer += kWarpSize) {
      if (peer != first) words = order.peers[peer];
      if (peer == order.rank || isLost(order, peer)) continue;
      storeRelaxed(words + SignalMap(order.numRanks).at(Word::entered, order.rank),
                   packSignal(order.operation, epoch));
    }
  }
  return __syncthreads_and(epoch != 0) != 0 ? epoch : 0;
}

/// Waits until all peers have begun; false, in all lanes, if one does not. Called by a warp.
__device__ inline bool awaitPeers(const Order& order, std::uint64_t epoch) {
  const bool came = awaitAll(order, epoch, Word::entered);
  __syncwarp();  // what any lane has seen comes before what all lanes do
  return came;
}

/// Ends one of `parts` of what the kernel does to memory of peers, each of which has waited for
/// them: the last one tells them. Called by a warp.
__device__ inline void finishPart(const Order& order, std::uint64_t epoch, unsigned parts) {
  __syncwarp();
  unsigned before = 0;
  if (laneIndex() == 0) before = addAcquireRelease(order.blocksDone, kOnePart) / kOnePart;
  before = __shfl_sync(kAllLanes, before, 0);
  __syncwarp();
  if (before + 1 != parts || currentEpoch(order) == 0) return;
  raiseAll(order, epoch, Word::finished);
}

/// Ends such a kernel, all parts of which have ended: its last block waits until the peers are done
/// with this rank's memory, and ends the epoch. Called by whole blocks, all of them.
__device__ inline void endVisit(const Order& order) {
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  const std::uint64_t epoch = currentEpoch(order);
  unsigned before = 0;
  if (threadIdx.x == 0) before = atomicAdd(order.blocksDone, 1U) % kOnePart;
  before = __shfl_sync(kAllLanes, before, 0);
  if (before + 1 != gridDim.x) return;
  const bool fine = epoch != 0 && awaitAll(order, epoch, Word::finished);
  if (threadIdx.x != 0) return;
  *order.blocksDone = 0;
  // Unless the buffer has failed, or does so now: whichever comes first, 0 remains.
  if (fine) atomicCAS(reinterpret_cast<unsigned long long*>(order.epoch), epoch, epoch + 1);
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_VISIT_CUH_
