// SPDX-License-Identifier: MIT
// GPU memory that ranks share: physical allocations of the driver, whose handles travel as file
// descriptors. A mapping keeps the memory alive when its owner has died.
#ifndef MSCCLPP_EP_TRANSPORT_CUDA_MEMORY_HPP_
#define MSCCLPP_EP_TRANSPORT_CUDA_MEMORY_HPP_

#include <functional>
#include <memory>

#include "transport/segment.hpp"

namespace mscclpp_ep {

/// Memory of a GPU; what peers share is mapped for that GPU. In a process of several ranks, all
/// GPUs that can reach the memory may use it. `rank` is this one's in its group. Throws NotBuilt if
/// the GPU or the driver cannot share memory in this way, CudaError if something fails.
std::shared_ptr<const SegmentSource> cudaSegments(int device, int rank);

/// Lets go of memory that the GPU may be using: at once, after having waited for the GPU, where one
/// rank of a group uses it in this process. Where several do, kernels of one may wait for another
/// whose thread this is: then when they have left.
void releaseWhenIdle(int device, std::function<void()> release);

/// Ranks of this process that share the memory of a GPU.
int ranksOnDevice(int device);

/// Whether a GPU's memory can be shared in this way.
bool sharesByDescriptor(int device);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_CUDA_MEMORY_HPP_
