// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_PLACEMENT_HPP_
#define MSCCLPP_EP_CUDA_PLACEMENT_HPP_

#include <memory>
#include <span>
#include <vector>

#include "core/layout.hpp"
#include "cuda/kernels.hpp"
#include "cuda/resources.hpp"

namespace mscclpp_ep::cuda {

/// The placement of experts, on the GPU; copied there when it has changed.
class DevicePlacement {
 public:
  PlacementArrays get(const ExpertPlacement& placement, DevicePool& pool, cudaStream_t stream) {
    std::vector<std::int32_t> owner;
    std::vector<std::int32_t> localIndex;
    for (std::int64_t e = 0; e < placement.numExperts(); ++e) {
      owner.push_back(placement.owner(e));
      localIndex.push_back(placement.localIndex(e));
    }
    if (owner != owner_) {
      ownerOnGpu_ = pool.upload(std::span<const std::int32_t>(owner), stream);
      localIndexOnGpu_ = pool.upload(std::span<const std::int32_t>(localIndex), stream);
      owner_ = std::move(owner);
    }
    return {reinterpret_cast<const std::int32_t*>(ownerOnGpu_.get()),
            reinterpret_cast<const std::int32_t*>(localIndexOnGpu_.get())};
  }

 private:
  std::vector<std::int32_t> owner_;  ///< local indices follow from it
  std::shared_ptr<std::byte> ownerOnGpu_;
  std::shared_ptr<std::byte> localIndexOnGpu_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PLACEMENT_HPP_
