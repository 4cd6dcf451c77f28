// SPDX-License-Identifier: MIT
// Every instruction that CUDA C++ has no name for.
#ifndef MSCCLPP_EP_CUDA_DEVICE_PTX_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_PTX_CUH_

#include <cstddef>
#include <cstdint>

namespace mscclpp_ep::cuda {

// Signals: words that other GPUs write and read.

__device__ __forceinline__ void storeRelease(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ std::uint64_t loadAcquire(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

/// Orders nothing: for a packet, whose one word is all that it says.
__device__ __forceinline__ void storeRelaxed(std::uint64_t* word, std::uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ std::uint64_t loadRelaxed(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

/// Before a relaxed store, what makes it a release.
__device__ __forceinline__ void fenceSystem() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

/// Counts blocks of this GPU: the one that is told of all others knows of all that they did.
__device__ __forceinline__ unsigned addAcquireRelease(unsigned* word, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(word), "r"(value)
               : "memory");
  return before;
}

/// Nanoseconds of a clock that goes on while a kernel is off the GPU.
__device__ __forceinline__ std::uint64_t globalTimer() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Conversions, by the bits of the 16-bit formats.

/// Both rounded to nearest even, `low` into the lower half; NaNs become 0x7FFF.
__device__ __forceinline__ std::uint32_t bfloat16PairFrom(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ std::uint32_t float16PairFrom(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float floatFromFloat16Bits(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

/// Waits for `threads` of a block, whole warps, at one of its 16 barriers, of which 0 is
/// __syncthreads().
__device__ __forceinline__ void syncThreads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Bulk copies (sm_90 and newer). One thread issues them; addresses and sizes are multiples of 16.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ std::uint32_t sharedAddress(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

/// A barrier in shared memory, of which `arrivals` threads end a phase. A fence follows before
/// others use it: fenceBarrierInit(), and __syncthreads().
__device__ __forceinline__ void initBarrier(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void fenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier)) : "memory");
}

/// Arrives, and lets the phase last until so many bytes of bulk loads have come, too.
__device__ __forceinline__ void arriveExpecting(std::uint64_t* barrier, std::uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool phaseEnded(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t ended;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(ended)
      : "r"(sharedAddress(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

/// Whether a phase has ended, without any wait.
__device__ __forceinline__ bool phaseHasEnded(std::uint64_t* barrier, std::uint32_t parity) {
  std::uint32_t ended;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
      "p; }"
      : "=r"(ended)
      : "r"(sharedAddress(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

/// Waits for a phase, of which even ones have parity 0. Bounded by what it waits for: threads of
/// the block, and copies, which end.
__device__ __forceinline__ void awaitPhase(std::uint64_t* barrier, std::uint32_t parity) {
  while (!phaseEnded(barrier, parity)) {
  }
}

__device__ __forceinline__ void bulkLoad(void* shared, const void* global, std::uint32_t bytes,
                                         std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(sharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(sharedAddress(barrier))
      : "memory");
}

__device__ __forceinline__ void bulkStore(void* global, const void* shared, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(sharedAddress(shared)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulkCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/// Waits until all but the last `kLeft` groups of this thread's stores have read their source.
template <int kLeft>
__device__ __forceinline__ void bulkAwaitReads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

/// Waits until this thread's stores are done: what it releases afterwards comes after them.
__device__ __forceinline__ void bulkAwaitStores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// The same, but for the last `kLeft` groups.
template <int kLeft>
__device__ __forceinline__ void bulkAwaitStoresBut() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}

/// Between accesses to global memory that were ordered by signals, and bulk copies of those bytes.
__device__ __forceinline__ void fenceGlobalProxy() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

#endif

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_PTX_CUH_
