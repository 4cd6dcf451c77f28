// SPDX-License-Identifier: MIT
// What the kernel that plans a dispatch tells the host.
#ifndef MSCCLPP_EP_CUDA_PLAN_REPORT_HPP_
#define MSCCLPP_EP_CUDA_PLAN_REPORT_HPP_

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/mapped.hpp"
#include "cuda/resources.hpp"

namespace mscclpp_ep::cuda {

/// In host memory, in front of sent[R], perRank[R], perExpert[E] and choices[E] (int32).
struct PlanReport {
  std::uint64_t ticket = 0;    ///< written last: the plan's number
  std::int64_t badPlace = -1;  ///< in topk_idx, of the first id out of range; -1: none
  std::int64_t badId = 0;

  std::int32_t* counts() { return reinterpret_cast<std::int32_t*>(this + 1); }
};

/// What the GPU noticed that no call waited for; in host memory. The first of each kind is kept.
struct Notice {
  std::int64_t badPlace = -1;  ///< as in PlanReport
  std::int64_t badId = 0;
  std::uint32_t countsDiffer = 0;  ///< those given from those of the routing
  std::uint32_t dropped = 0;       ///< rows did not fit num_worst_tokens, of this operation
  std::int64_t numRecv = 0;
  std::int64_t numRows = 0;
};

/// The memory that the plans of one buffer work with.
class PlanReporter {
 public:
  /// Makes it large enough for so many.
  void reserve(int numRanks, std::int64_t numExperts) {
    const auto wanted = static_cast<std::size_t>(numRanks + numExperts);
    if (!rooms_.empty() && wanted <= rooms_.back()->wanted) return;
    rooms_.push_back(std::make_unique<Room>(wanted));
    doNow([&](cudaStream_t stream) {
      EP_CUDA_TRY(
          cudaMemsetAsync(scratch(), 0, Room::scratchCount(wanted) * sizeof(std::int32_t), stream),
          "cannot clear memory");
    });
  }

  PlanReport* report() const { return reinterpret_cast<PlanReport*>(rooms_.back()->report.get()); }
  Notice* notice() const { return notice_.get(); }
  std::int32_t* scratch() const { return rooms_.back()->scratch.get(); }
  std::uint64_t nextTicket() { return ++ticket_; }

  /// Words of the scratch before the counts of choices: blocks done, and a place in 64 bits.
  static constexpr std::size_t kScratchHead = 4;

 private:
  struct Room {
    explicit Room(std::size_t count)
        : wanted(count), report(reportWords(count)), scratch(scratchCount(count)) {}
    static std::size_t reportWords(std::size_t count) {
      return (sizeof(PlanReport) + 2 * count * sizeof(std::int32_t)) / sizeof(std::uint64_t) + 1;
    }
    static std::size_t scratchCount(std::size_t count) { return count + kScratchHead; }

    std::size_t wanted;
    Mapped<std::uint64_t> report;
    DeviceArray<std::int32_t> scratch;
  };

  std::uint64_t ticket_ = 0;
  std::vector<std::unique_ptr<Room>> rooms_;  ///< also those too small: graphs refer to them
  Mapped<Notice> notice_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PLAN_REPORT_HPP_
