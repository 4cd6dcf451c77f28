// SPDX-License-Identifier: MIT
// Streams and memory of the CUDA runtime, owned.
#ifndef MSCCLPP_EP_CUDA_RESOURCES_HPP_
#define MSCCLPP_EP_CUDA_RESOURCES_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "host/returned_blocks.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

/// A stream of the current GPU that does not wait for the default one, of the highest priority:
/// what a kernel of it sends, others wait for. It is never destroyed, but used again: allocators of
/// frameworks that were told of it record events on it when memory is dropped, at any time.
class OwnedStream {
 public:
  OwnedStream();
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;

  cudaStream_t get() const { return stream_; }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
};

/// Memory of the current GPU. Throws SystemError if there is not so much.
void* takeDeviceMemory(std::size_t bytes);
void freeDeviceMemory(int device, void* data);

/// An array in the memory of the current GPU.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count)
      : device_(currentDevice()), data_(static_cast<T*>(takeDeviceMemory(count * sizeof(T)))) {}
  ~DeviceArray() { freeDeviceMemory(device_, static_cast<void*>(data_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return data_; }
  /// The first elements; returns when they are there.
  void write(const std::vector<T>& values) const {
    EP_CUDA_TRY(cudaMemcpy(static_cast<void*>(data_), static_cast<const void*>(values.data()),
                           values.size() * sizeof(T), cudaMemcpyHostToDevice),
                "cannot write to the memory of the GPU");
  }

 private:
  int device_;
  T* data_;
};

/// Does work on a stream of its own, and waits for it, also while a graph is captured: it is not
/// part of the graph.
template <typename Work>
void doNow(const Work& work) {
  const RelaxedCapture relaxed;
  const OwnedStream stream;
  work(stream.get());
  EP_CUDA_TRY(cudaStreamSynchronize(stream.get()), "work on the GPU failed");
}

/// GPU memory that peers do not reach, kept for reuse when its user lets go of it: cudaMalloc and
/// cudaFree wait for the GPU.
class DevicePool {
 public:
  explicit DevicePool(MakeFence makeFence);

  /// At least `bytes`, aligned to 256. It may outlive the pool, and any thread may drop it.
  /// Throws SystemError if there is not enough memory.
  std::shared_ptr<std::byte> allocate(std::size_t bytes);
  /// As ReturnedBlocks::freeDropped().
  void freeDropped();

  /// In use or kept.
  std::int64_t bytes() const;

 private:
  struct Shelves;
  std::shared_ptr<Shelves> shelves_;
  MakeFence makeFence_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_RESOURCES_HPP_
