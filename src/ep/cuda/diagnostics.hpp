// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_DIAGNOSTICS_HPP_
#define MSCCLPP_EP_CUDA_DIAGNOSTICS_HPP_

#include <cstddef>
#include <vector>

#include "cuda/context.hpp"

namespace mscclpp_ep::cuda {

/// Of Buffer::timePush().
std::vector<double> timePush(Context& context, std::size_t bytes, int repeats);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DIAGNOSTICS_HPP_
