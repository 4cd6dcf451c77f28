// SPDX-License-Identifier: MIT
// Streams and memory of the CUDA runtime, owned.
#ifndef MSCCLPP_EP_CUDA_RESOURCES_HPP_
#define MSCCLPP_EP_CUDA_RESOURCES_HPP_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

/// A stream that does not wait for the default one.
class OwnedStream {
 public:
  OwnedStream() {
    EP_CUDA_TRY(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cannot make a stream");
  }
  ~OwnedStream() { (void)cudaStreamDestroy(stream_); }
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;

  cudaStream_t get() const { return stream_; }
  /// Waits on the host for what is enqueued.
  void synchronize(const char* what) const {
    EP_CUDA_TRY(cudaStreamSynchronize(stream_), what, " failed on the GPU");
  }

 private:
  cudaStream_t stream_ = nullptr;
};

/// GPU memory that peers do not reach, kept for reuse when its user lets go of it: cudaMalloc and
/// cudaFree wait for the GPU.
class DevicePool {
 public:
  DevicePool();

  /// At least `bytes`, aligned to 256. It may outlive the pool, and any thread may drop it. What
  /// was dropped is given out again once the GPU has done all work that was enqueued by then.
  /// Throws SystemError if there is not enough memory.
  std::shared_ptr<std::byte> allocate(std::size_t bytes);
  /// A copy of host memory, enqueued; `values` may be dropped at once.
  template <typename T>
  std::shared_ptr<std::byte> upload(std::span<const T> values, cudaStream_t stream) {
    auto block = allocate(values.size_bytes());
    // From pageable memory the copy is staged before the call returns.
    EP_CUDA_TRY(cudaMemcpyAsync(block.get(), values.data(), values.size_bytes(),
                                cudaMemcpyHostToDevice, stream),
                "cannot copy to the GPU");
    return block;
  }

  /// In use or kept.
  std::int64_t bytes() const;

 private:
  struct Shelves;
  std::shared_ptr<Shelves> shelves_;
};

/// Waits until the current GPU has done all that was enqueued in this process: whatever stream a
/// caller used memory on that he has dropped since, it is free then.
inline void settle() {
  EP_CUDA_TRY(cudaDeviceSynchronize(), "work that was enqueued before failed on the GPU");
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_RESOURCES_HPP_
