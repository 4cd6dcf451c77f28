// SPDX-License-Identifier: MIT
// How a kernel waits for those of other ranks. Every wait ends: by what it waits for, when time is
// up, when the host says so, or when another block has given up. Where ranks may be lost, such an
// end is that of the rank that was waited for, not of the buffer.
#ifndef MSCCLPP_EP_CUDA_DEVICE_ORDER_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_ORDER_CUH_

#include <cstdint>

#include "core/packets.hpp"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/order.hpp"

namespace mscclpp_ep::cuda {

__device__ __forceinline__ std::uint64_t currentEpoch(const Order& order) {
  return *reinterpret_cast<volatile std::uint64_t*>(order.epoch);
}

/// Raises a word at a peer, behind all that this thread knows of.
__device__ __forceinline__ void raise(const Order& order, std::uint64_t epoch, Word word, int peer,
                                      std::uint32_t value) {
  storeRelease(order.peers[peer] + SignalMap(order.numRanks).at(word, order.rank),
               packSignal(value, epoch));
}

/// A word that was never raised is 0, and may have the right tag.
__device__ __forceinline__ bool isOf(std::uint64_t signal, std::uint64_t epoch) {
  return signalTag(signal) == static_cast<std::uint32_t>(epoch) && signalValue(signal) != 0;
}

// Ranks that are lost.

__device__ __forceinline__ bool shrinks(const Order& order) { return order.shrinking != nullptr; }

/// Whether this rank goes on without a peer.
__device__ __forceinline__ bool isLost(const Order& order, int peer) {
  return shrinks(order) &&
         *reinterpret_cast<const volatile std::uint32_t*>(order.shrinking->lost + peer) != 0;
}

/// Whether a peer goes on without this rank, and has said so in this operation, or in the one
/// before when it had done its part. Older words are of ranks that have met again since.
__device__ inline bool hasParted(const Order& order, std::uint64_t epoch, int peer) {
  const std::uint64_t word =
      loadAcquire(order.own + SignalMap(order.numRanks).at(Word::parted, peer));
  return isOf(word, epoch) || isOf(word, epoch - 1);
}

/// Goes on without a peer. The host is told by the first thread to find out.
__device__ inline void lose(const Order& order, std::uint64_t epoch, int peer) {
  if (atomicExch(order.shrinking->lost + peer, 1U) != 0) return;
  raise(order, epoch, Word::parted, peer, 1);
  storeRelease(order.shrinking->losses + peer, epoch);
}

/// Whether a wait for a peer is in vain before its time is up: of a buffer that shrinks.
__device__ inline bool isInVain(const Order& order, std::uint64_t epoch, int peer) {
  return isLost(order, peer) || hasParted(order, epoch, peer) ||
         *reinterpret_cast<const volatile std::uint32_t*>(order.shrinking->gone + peer) != 0;
}

/// Decides whether a wait for a peer goes on, that polls. The host's words are far away, so they
/// are looked at now and then only.
class Patience {
 public:
  /// With a negative `peer`, there is none. `behindOthers`: what is awaited comes from a kernel
  /// that may be waiting for a rank that is no more; it is given time to find out.
  __device__ Patience(const Order& order, std::uint64_t epoch, int peer, bool behindOthers = true)
      : order_(order),
        epoch_(epoch),
        deadline_(globalTimer() + order.timeout * (shrinks(order) && behindOthers ? 2 : 1)),
        peer_(peer) {}

  __device__ bool left() {
    if (++polls_ % kPollsBetween != 0) return true;
    if (currentEpoch(order_) == 0 || globalTimer() > deadline_) return false;
    if (shrinks(order_) && peer_ >= 0 && isInVain(order_, epoch_, peer_)) return false;
    aborted_ = *reinterpret_cast<const volatile std::uint32_t*>(order_.abort) != 0;
    return !aborted_;
  }
  __device__ bool aborted() const { return aborted_; }

 private:
  static constexpr unsigned kPollsBetween = 1024;
  const Order& order_;
  std::uint64_t epoch_;
  std::uint64_t deadline_;
  int peer_;
  unsigned polls_ = 0;
  bool aborted_ = false;
};

/// Ends the buffer on this rank, and leaves word for the host. The first of those that fail is
/// kept: the others follow from it.
__device__ inline void fail(const Order& order, std::uint64_t epoch, Word word, int peer,
                            std::uint64_t seen, bool aborted) {
  const auto before = atomicExch(reinterpret_cast<unsigned long long*>(order.epoch), 0ULL);
  if (before == 0) return;
  order.failure->peer = static_cast<std::uint32_t>(peer);
  order.failure->word = static_cast<std::uint32_t>(word);
  order.failure->seen = seen;
  order.failure->aborted = aborted ? 1 : 0;
  storeRelease(&order.failure->epoch, epoch);
}

/// Ends a wait for a peer, `peer`, that was in vain: without the peer, or the buffer.
__device__ inline void giveUp(const Order& order, std::uint64_t epoch, Word word, int peer,
                              std::uint64_t seen, bool aborted) {
  if (!shrinks(order) || aborted) return fail(order, epoch, word, peer, seen, aborted);
  if (currentEpoch(order) != 0) lose(order, epoch, peer);
}

/// Waits for a word of a peer's; 0 if that does not come.
__device__ inline std::uint64_t awaitWord(const Order& order, std::uint64_t epoch, Word word,
                                          int peer) {
  const std::uint64_t* place = order.own + SignalMap(order.numRanks).at(word, peer);
  Patience patience(order, epoch, peer, word != Word::entered);
  std::uint64_t seen = loadAcquire(place);
  while (!isOf(seen, epoch)) {
    const bool left = patience.left();
    // What a peer did before it ended counts: it is looked for once more.
    seen = loadAcquire(place);
    if (left || isOf(seen, epoch)) continue;
    giveUp(order, epoch, word, peer, seen, patience.aborted());
    return 0;
  }
  return seen;
}

/// Raises a word at all peers that are not lost. Called by a warp.
__device__ inline void raiseAll(const Order& order, std::uint64_t epoch, Word word) {
  const std::uint32_t value = word == Word::entered ? order.operation : 1;
  for (int peer = laneIndex(); peer < order.numRanks; peer += kWarpSize) {
    if (peer != order.rank && !isLost(order, peer)) raise(order, epoch, word, peer, value);
  }
}

/// Waits for the words of all peers; false, in all lanes, if one does not come that is not lost by
/// that. Called by a warp.
__device__ inline bool awaitAll(const Order& order, std::uint64_t epoch, Word word) {
  bool came = true;
  for (int peer = laneIndex(); peer < order.numRanks; peer += kWarpSize) {
    if (peer == order.rank || isLost(order, peer)) continue;
    came = (awaitWord(order, epoch, word, peer) != 0 || isLost(order, peer)) && came;
  }
  return __all_sync(kAllLanes, came);
}

/// Begins a kernel that reaches into the memory of peers: lets them reach into this rank's, and
/// waits until they let this one. Called by whole blocks, all of them; false, for the whole block,
/// if the kernel has to end without having done anything.
__device__ inline bool enterPeers(const Order& order) {
  const std::uint64_t epoch = currentEpoch(order);
  bool entered = epoch != 0;
  if (threadIdx.x < kWarpSize && entered && order.numRanks > 1) {
    if (blockIdx.x == 0) raiseAll(order, epoch, Word::entered);
    entered = awaitAll(order, epoch, Word::entered);
  }
  return __syncthreads_and(entered) != 0;
}

/// Ends such a kernel, whose threads have done all that they do to the memory of peers: the last
/// block to come here tells them, waits until they are done with this rank's, and ends the epoch.
/// Called by whole blocks, all of them; false, for the whole block, if a peer was waited for in
/// vain.
__device__ inline bool leavePeers(const Order& order) {
  __syncthreads();
  bool fine = true;
  if (threadIdx.x < kWarpSize) {
    unsigned before = 0;
    if (threadIdx.x == 0) before = addAcquireRelease(order.blocksDone, 1);
    before = __shfl_sync(kAllLanes, before, 0);
    __syncwarp();  // what lane 0 has seen comes before what all lanes raise
    const std::uint64_t epoch = currentEpoch(order);
    if (before + 1 == gridDim.x) {
      if (epoch != 0 && order.numRanks > 1) {
        raiseAll(order, epoch, Word::finished);
        fine = awaitAll(order, epoch, Word::finished);
      }
      if (threadIdx.x == 0) {
        *order.blocksDone = 0;
        if (epoch != 0 && fine) *order.epoch = epoch + 1;
      }
    }
    fine = fine && epoch != 0;
  }
  return __syncthreads_and(fine) != 0;
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_ORDER_CUH_
