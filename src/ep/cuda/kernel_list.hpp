// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_KERNEL_LIST_HPP_
#define MSCCLPP_EP_CUDA_KERNEL_LIST_HPP_

namespace mscclpp_ep::cuda {

bool listKernel(const void* kernel);

/// Loads all kernels of the library on the current GPU. One that is loaded when it is first used
/// waits for the GPU, and so for other ranks on it, which wait for this one.
void loadKernels();

/// Lists a kernel for loadKernels() before main(), where a function that starts it calls this.
template <auto kKernel>
struct Listed {
  static bool name() { return kListed; }
  static inline const bool kListed = listKernel(reinterpret_cast<const void*>(kKernel));
};
#define EP_LIST_KERNEL(...) static_cast<void>(::mscclpp_ep::cuda::Listed<__VA_ARGS__>::name())

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_KERNEL_LIST_HPP_
