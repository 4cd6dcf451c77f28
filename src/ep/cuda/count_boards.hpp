// SPDX-License-Identifier: MIT
// Where the hosts of all ranks are told by GPUs how many rows and choices come to them: in the
// control segments, which kernels reach. So no host has to pass on what its GPU has told it.
#ifndef MSCCLPP_EP_CUDA_COUNT_BOARDS_HPP_
#define MSCCLPP_EP_CUDA_COUNT_BOARDS_HPP_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/layout.hpp"
#include "cuda/kernels.hpp"
#include "cuda/resources.hpp"
#include "host/context.hpp"
#include "host/exchange_counts.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep::cuda {

/// Each rank has a board at each: of words {count + 1, tag of the operation}, of which the first
/// counts rows, and the others the choices of each of the receiver's experts.
class CountBoards {
 public:
  /// Throws CudaError if the memory of hosts cannot be reached by the GPU.
  explicit CountBoards(const Transport& transport);

  /// Whether there is room for the counts of all experts.
  static bool fit(const ExpertPlacement& placement, int numRanks);

  /// This rank's, for a kernel.
  const PerRank<std::uint64_t*>& outgoing() const { return outgoing_; }
  /// Takes the counts that come to this rank, once it knows its own, and waits for those that are
  /// late as Transport::wait() does.
  void receive(const HostContext& context, std::int64_t numLocalExperts, DispatchPlan& plan) const;

 private:
  class Registration;

  std::vector<std::shared_ptr<Registration>> registrations_;
  PerRank<std::uint64_t*> outgoing_;
  std::optional<DeviceArray<std::uint64_t*>> many_;  ///< behind those of many ranks
  std::vector<const std::uint64_t*> incoming_;       ///< [R]
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_COUNT_BOARDS_HPP_
