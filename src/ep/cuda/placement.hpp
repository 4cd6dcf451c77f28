// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_PLACEMENT_HPP_
#define MSCCLPP_EP_CUDA_PLACEMENT_HPP_

#include <map>
#include <vector>

#include "core/layout.hpp"
#include "cuda/kernels.hpp"
#include "cuda/resources.hpp"

namespace mscclpp_ep::cuda {

/// The placements of experts, on the GPU. Of one buffer they depend on the number of experts only.
/// None is dropped: a graph may refer to it.
class DevicePlacements {
 public:
  PlacementArrays get(const ExpertPlacement& placement) {
    const std::int64_t experts = placement.numExperts();
    const auto [at, isNew] = arrays_.try_emplace(experts, static_cast<std::size_t>(2 * experts));
    if (isNew) store(placement, at->second);
    return {experts, at->second.get(), at->second.get() + experts};
  }

 private:
  static void store(const ExpertPlacement& placement, const DeviceArray<std::int32_t>& array) {
    std::vector<std::int32_t> values;
    values.reserve(static_cast<std::size_t>(2 * placement.numExperts()));
    for (std::int64_t e = 0; e < placement.numExperts(); ++e) values.push_back(placement.owner(e));
    for (std::int64_t e = 0; e < placement.numExperts(); ++e) {
      values.push_back(placement.localIndex(e));
    }
    doNow([&](cudaStream_t stream) {
      storeValues(array.get(), values.data(), static_cast<std::int64_t>(values.size()), stream);
    });
  }

  std::map<std::int64_t, DeviceArray<std::int32_t>> arrays_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PLACEMENT_HPP_
