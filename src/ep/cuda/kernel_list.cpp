// SPDX-License-Identifier: MIT
#include "cuda/kernel_list.hpp"

#include <vector>

#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

std::vector<const void*>& kernels() {
  static std::vector<const void*> list;
  return list;
}

}  // namespace

bool listKernel(const void* kernel) {
  kernels().push_back(kernel);
  return true;
}

void loadKernels() {
  for (const void* kernel : kernels()) {
    cudaFuncAttributes attributes{};
    EP_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernel), "cannot load a kernel");
  }
}

}  // namespace mscclpp_ep::cuda
