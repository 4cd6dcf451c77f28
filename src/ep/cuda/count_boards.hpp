// SPDX-License-Identifier: MIT
// Where a GPU tells the hosts of all ranks the counts of a dispatch: in their control segments,
// which it reaches. So no host has to pass on what its GPU has told it.
#ifndef MSCCLPP_EP_CUDA_COUNT_BOARDS_HPP_
#define MSCCLPP_EP_CUDA_COUNT_BOARDS_HPP_

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/resources.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep::cuda {

/// This rank's boards: one at each rank, ControlMap::counts().
class CountBoards {
 public:
  /// Throws CudaError if the memory of hosts cannot be reached by the GPU.
  explicit CountBoards(const Transport& transport);

  /// For a kernel.
  const PerRank<std::uint64_t*>& places() const { return places_; }

 private:
  class Registration;

  std::vector<std::shared_ptr<Registration>> registrations_;
  PerRank<std::uint64_t*> places_;
  std::optional<DeviceArray<std::uint64_t*>> many_;  ///< behind those of many ranks
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_COUNT_BOARDS_HPP_
