// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_MAPPED_HPP_
#define MSCCLPP_EP_CUDA_MAPPED_HPP_

#include <cstddef>
#include <type_traits>

#include "transport/cuda_check.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep::cuda {

/// Host memory that kernels read and write at the same address, zeroed.
template <typename T>
class Mapped {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  explicit Mapped(std::size_t count = 1) : device_(currentDevice()) {
    const RelaxedCapture relaxed;
    void* data = nullptr;
    EP_CUDA_TRY(
        cudaHostAlloc(&data, count * sizeof(T), cudaHostAllocMapped | cudaHostAllocPortable),
        "cannot take host memory that the GPU can use");
    data_ = static_cast<T*>(data);
    for (std::size_t i = 0; i < count; ++i) data_[i] = T{};
  }
  ~Mapped() {
    releaseWhenIdle(device_, [data = data_] { (void)cudaFreeHost(data); });
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;

  T* get() const { return data_; }
  T& operator*() const { return *data_; }
  T* operator->() const { return data_; }

 private:
  int device_;
  T* data_ = nullptr;
};

/// A word that the other side writes, after all that it is to tell of.
template <typename T>
T acquire(const T& word) {
  return __atomic_load_n(&word, __ATOMIC_ACQUIRE);
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_MAPPED_HPP_
