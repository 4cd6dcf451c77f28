// SPDX-License-Identifier: MIT
// What the tensors of a dispatch say of where tokens go.
#ifndef MSCCLPP_EP_CORE_ROUTING_HPP_
#define MSCCLPP_EP_CORE_ROUTING_HPP_

#include <cstdint>
#include <memory>
#include <vector>

#include "core/layout.hpp"
#include "mscclpp_ep/options.hpp"

namespace mscclpp_ep {

struct Routing {
  std::shared_ptr<const SendPlan> plan;  ///< its heads stay on the GPU, if rows are there
  /// [R] numTokensPerRank, as given; empty, as `choices` is, where a GPU compares the counts.
  std::vector<std::int32_t> perRank;
  std::vector<std::int32_t> perExpert;  ///< [E] numTokensPerExpert, as given
  /// [E] choices of the tokens that go to the rank of their expert; empty without top-k.
  std::vector<std::int64_t> choices;
  std::shared_ptr<const void> onGpu;  ///< what a GPU keeps of it
  bool countsFollow = false;          ///< GPUs tell the hosts counts, while the ranks enter
};

/// Reads tensors in the memory of the host. Throws InvalidArgument for ids out of range.
Routing readRouting(const DispatchInputs& inputs, const ExpertPlacement& placement);

/// Throws InvalidArgument if an id is not -1 to E - 1. `topkIdx` is in the memory of the host.
void checkIds(const TensorView& topkIdx, std::int64_t numExperts);
/// For ids elsewhere: throws what checkIds() does of the id at a place in [T, K].
[[noreturn]] void throwBadId(std::int64_t place, std::int64_t topk, std::int64_t id,
                             std::int64_t numExperts);

/// Throws InvalidArgument unless the counts that were given are those of the routing.
void checkCounts(const Routing& routing);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_ROUTING_HPP_
