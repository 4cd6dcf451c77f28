// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_KERNEL_LIST_HPP_
#define MSCCLPP_EP_CUDA_KERNEL_LIST_HPP_

namespace mscclpp_ep::cuda {

/// A limit of shared memory that depends on the current GPU, in bytes.
using SharedLimit = int (*)();

/// One of the kernels of the library, which know of each other before main().
class ListedKernel {
 public:
  ListedKernel(const void* kernel, SharedLimit mostShared) noexcept;
  ListedKernel(const ListedKernel&) = delete;
  ListedKernel& operator=(const ListedKernel&) = delete;

  const void* kernel() const { return kernel_; }
  /// What it may be launched with beyond what it declares; null: what any kernel may.
  SharedLimit limit() const { return limit_; }
  const ListedKernel* next() const { return next_; }

 private:
  const void* kernel_;
  SharedLimit limit_;
  const ListedKernel* next_;
};

/// Loads all kernels of the library on the current GPU. One that is loaded when it is first used
/// waits for the GPU, and so for other ranks on it, which wait for this one.
void loadKernels();

/// Lists a kernel, and its limit of shared memory if it has one, where a function that starts it
/// calls this.
template <auto kKernel, SharedLimit kLimit = nullptr>
struct Listed {
  static const ListedKernel& name() { return kListed; }
  static inline const ListedKernel kListed{reinterpret_cast<const void*>(kKernel), kLimit};
};
#define EP_LIST_KERNEL(...) static_cast<void>(::mscclpp_ep::cuda::Listed<__VA_ARGS__>::name())

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_KERNEL_LIST_HPP_
