// SPDX-License-Identifier: MIT
// How fast a GPU hands rows to the link to its peers.
#ifndef MSCCLPP_EP_CUDA_LINK_PACE_HPP_
#define MSCCLPP_EP_CUDA_LINK_PACE_HPP_

#include <cstdint>

namespace mscclpp_ep::cuda {

/// What 18 links of NVLink 4 carry one way while as much comes the other way. A GPU that hands them
/// more, as 15 to 60 multiprocessors do that push at will, is slowed down by the jam: to 285 to
/// 340, as measured on two H200. At this rate it is the same for any number of multiprocessors.
inline constexpr float kLinkBytesPerNanosecond = 365.0F;

/// How long so many bytes take to cross the link from a GPU of a compute capability; 0: as long as
/// it may. Where there are fewer links, the pace does no harm; of faster ones none is known.
constexpr float nanosecondsToCross(std::int64_t bytes, int computeCapability) {
  constexpr int kHopper = 90;
  return computeCapability == kHopper ? static_cast<float>(bytes) / kLinkBytesPerNanosecond : 0.0F;
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_LINK_PACE_HPP_
