// SPDX-License-Identifier: MIT
#include "cuda/kernel_list.hpp"

#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constinit const ListedKernel* first = nullptr;

}  // namespace

ListedKernel::ListedKernel(const void* kernel, SharedLimit mostShared) noexcept
    : kernel_(kernel), limit_(mostShared), next_(first) {
  first = this;
}

void loadKernels() {
  for (const ListedKernel* listed = first; listed != nullptr; listed = listed->next()) {
    cudaFuncAttributes attributes{};
    EP_CUDA_TRY(cudaFuncGetAttributes(&attributes, listed->kernel()), "cannot load a kernel");
    if (listed->limit() == nullptr) continue;
    const int bytes = listed->limit()();
    EP_CUDA_TRY(
        cudaFuncSetAttribute(listed->kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "a kernel cannot have ", bytes, " bytes of shared memory");
  }
}

}  // namespace mscclpp_ep::cuda
