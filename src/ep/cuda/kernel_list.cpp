// SPDX-License-Identifier: MIT
#include "cuda/kernel_list.hpp"

#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constinit const ListedKernel* first = nullptr;

}  // namespace

ListedKernel::ListedKernel(const void* kernel) noexcept : kernel_(kernel), next_(first) {
  first = this;
}

void loadKernels() {
  for (const ListedKernel* listed = first; listed != nullptr; listed = listed->next()) {
    cudaFuncAttributes attributes{};
    EP_CUDA_TRY(cudaFuncGetAttributes(&attributes, listed->kernel()), "cannot load a kernel");
  }
}

}  // namespace mscclpp_ep::cuda
