// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_RUNTIME_HPP_
#define MSCCLPP_EP_CUDA_RUNTIME_HPP_

#include "transport/cuda_check.hpp"

#endif  // MSCCLPP_EP_CUDA_RUNTIME_HPP_
