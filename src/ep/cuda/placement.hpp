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

/// The placement of experts, on the GPU. Of one buffer it depends on their number only, and is
/// copied there when that has changed.
class DevicePlacement {
 public:
  PlacementArrays get(const ExpertPlacement& placement, DevicePool& pool, cudaStream_t stream) {
    if (numExperts_ != placement.numExperts()) upload(placement, pool, stream);
    return {reinterpret_cast<const std::int32_t*>(owner_.get()),
            reinterpret_cast<const std::int32_t*>(localIndex_.get())};
  }

 private:
  void upload(const ExpertPlacement& placement, DevicePool& pool, cudaStream_t stream) {
    std::vector<std::int32_t> owner;
    std::vector<std::int32_t> localIndex;
    for (std::int64_t e = 0; e < placement.numExperts(); ++e) {
      owner.push_back(placement.owner(e));
      localIndex.push_back(placement.localIndex(e));
    }
    owner_ = pool.upload(std::span<const std::int32_t>(owner), stream);
    localIndex_ = pool.upload(std::span<const std::int32_t>(localIndex), stream);
    numExperts_ = placement.numExperts();
  }

  std::int64_t numExperts_ = -1;
  std::shared_ptr<std::byte> owner_;
  std::shared_ptr<std::byte> localIndex_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PLACEMENT_HPP_
