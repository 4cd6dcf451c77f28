// SPDX-License-Identifier: MIT
// What the GPU keeps of the routing of a dispatch, as its handle refers to it.
#ifndef MSCCLPP_EP_CUDA_ROUTING_HPP_
#define MSCCLPP_EP_CUDA_ROUTING_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/backend.hpp"
#include "cuda/context.hpp"
#include "cuda/count_boards.hpp"
#include "cuda/kernels.hpp"
#include "cuda/plan_report.hpp"

namespace mscclpp_ep::cuda {

/// The counts of a dispatch, as int32 in one piece of memory: where each of them begins.
class CountsMap {
 public:
  CountsMap(int numRanks, std::int64_t numLocalExperts)
      : ranks_(numRanks), experts_(numLocalExperts) {}

  std::int64_t sent() const { return 0; }
  /// From here on, what the plan of this rank does not know yet.
  std::int64_t numRecv() const { return sent() + ranks_; }
  std::int64_t prefixMatrix() const { return numRecv() + 1; }
  std::int64_t channelPrefix() const { return prefixMatrix() + ranks_ * ranks_; }
  std::int64_t perExpert() const { return channelPrefix() + ranks_; }
  // The handle does not show these.
  /// Row of this rank's first token at each receiver.
  std::int64_t firstRows() const { return perExpert() + experts_; }
  /// Row here of each sender's first token, and how many of its rows there are.
  std::int64_t firstRowFrom() const { return firstRows() + ranks_; }
  std::int64_t numKeptFrom() const { return firstRowFrom() + ranks_; }
  std::int64_t size() const { return numKeptFrom() + ranks_; }

 private:
  std::int64_t ranks_;
  std::int64_t experts_;
};

struct DeviceRouting {
  std::shared_ptr<std::byte> memory;  ///< of all that follows
  std::int32_t* head = nullptr;       ///< [T, R]: SendPlan::head
  std::int32_t* counts = nullptr;     ///< of a CountsMap
  std::int64_t numLocalExperts = 0;
  Tensor shownHead;  ///< copies, that callers may write to
  Tensor shownInRank;

  std::int32_t* count(std::int64_t at) const { return counts + at; }
};

/// Of a request that has been examined, or of the handle that it repeats.
inline const DeviceRouting& deviceRouting(const std::shared_ptr<const void>& onGpu) {
  return *static_cast<const DeviceRouting*>(onGpu.get());
}

/// Lets the GPU find out where the tokens of a dispatch go. With `boards`, if the host waits, the
/// GPUs tell all hosts the counts of that epoch.
void examineRouting(Context& context, PlanReporter& reporter, const PlacementArrays& placement,
                    DispatchRequest& request, const CountBoards* boards, std::uint64_t epoch);
/// Waits for the counts as the caller has given them, of a request that has no num_worst_tokens: if
/// counts follow, those of rows.
void awaitCounts(const Context& context, const PlanReporter& reporter, DispatchRequest& request);
/// Throws InvalidArgument if these counts, or ids, turned out to be wrong.
void verifyRouting(const Context& context, const PlanReporter& reporter,
                   const DispatchRequest& request);

TopkArrays topkOf(const DispatchInputs& inputs);

/// What a handle shows of the counts in the memory of the GPU.
HandleFields makeFields(const Context& context, const DeviceRouting& routing);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_ROUTING_HPP_
