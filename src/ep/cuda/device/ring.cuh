// SPDX-License-Identifier: MIT
// Places in shared memory that one role of a block fills and another empties, over and over.
#ifndef MSCCLPP_EP_CUDA_DEVICE_RING_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_RING_CUH_

#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// Where a role is on its way around a ring of `size` places.
class RingPosition {
 public:
  __device__ explicit RingPosition(int size) : size_(size) {}

  __device__ int place() const { return place_; }
  /// Of the phase that ends when the place has been filled, or emptied, in this round.
  __device__ std::uint32_t parity() const { return round_; }
  __device__ void advance() {
    if (++place_ < size_) return;
    place_ = 0;
    round_ ^= 1;
  }

 private:
  int size_;
  int place_ = 0;
  std::uint32_t round_ = 0;
};

template <int kMost>
struct RingBarriers {
  std::uint64_t full[kMost];
  std::uint64_t empty[kMost];
  int size;

  /// One thread fills a place, `emptiers` empty it. fenceBarrierInit() and __syncthreads() follow.
  __device__ void init(int places, int emptiers) {
    size = places;
    for (int i = 0; i < size; ++i) {
      initBarrier(&full[i], 1);
      initBarrier(&empty[i], emptiers);
    }
  }
  /// The same by a warp, for at most as many places as it has lanes: faster.
  __device__ void initByWarp(int places, int emptiers) {
    const auto lane = laneIndex();
    if (lane == 0) size = places;
    if (lane >= places) return;
    initBarrier(&full[lane], 1);
    initBarrier(&empty[lane], emptiers);
  }
  /// Waits until the place may be filled: in the first round at once, as the phase before the first
  /// of a barrier counts as ended.
  __device__ void awaitEmpty(const RingPosition& at) {
    awaitPhase(&empty[at.place()], at.parity() ^ 1);
  }
  __device__ void awaitFull(const RingPosition& at) { awaitPhase(&full[at.place()], at.parity()); }
  __device__ bool isFull(const RingPosition& at) {
    return phaseHasEnded(&full[at.place()], at.parity());
  }
};

#endif

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_RING_CUH_
