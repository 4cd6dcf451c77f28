// SPDX-License-Identifier: MIT
// What the kernel that plans a dispatch tells the host.
#ifndef MSCCLPP_EP_CUDA_PLAN_REPORT_HPP_
#define MSCCLPP_EP_CUDA_PLAN_REPORT_HPP_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/mapped.hpp"
#include "cuda/resources.hpp"

namespace mscclpp_ep::cuda {

/// Where things are in a report to a host that waits for it. It is words of {value, tag of the
/// plan's number}: they come in any order, and none has to wait for another. First what the caller
/// has given, which comes at once, so that the host can go on, but for counts of experts that all
/// hosts are told otherwise; then whether it is right, and if not, all of it.
class ReportMap {
 public:
  __host__ __device__ ReportMap(int numRanks, std::int64_t numExperts)
      : ranks_(numRanks), experts_(numExperts) {}

  /// [R] and [E], as given.
  __host__ __device__ std::int64_t perRank() const { return 0; }
  __host__ __device__ std::int64_t perExpert() const { return perRank() + ranks_; }
  /// From here on, what was found.
  __host__ __device__ std::int64_t findings() const { return perExpert() + experts_; }
  /// Whether what was given is not what was found.
  __host__ __device__ std::int64_t countsDiffer() const { return findings(); }
  // Of the first id that is out of range, in two halves each, the lower one first.
  /// One more than where it is in topk_idx; 0: there is none.
  __host__ __device__ std::int64_t badPlace() const { return countsDiffer() + 1; }
  __host__ __device__ std::int64_t badId() const { return badPlace() + 2; }
  /// [R] and [E], if they differ from those given; the latter mean nothing without top-k.
  __host__ __device__ std::int64_t sent() const { return badId() + 2; }
  __host__ __device__ std::int64_t choices() const { return sent() + ranks_; }
  __host__ __device__ std::int64_t size() const { return choices() + experts_; }

 private:
  std::int64_t ranks_;
  std::int64_t experts_;
};

/// What the GPU noticed that no call waited for; in host memory. The first of each kind is kept.
struct Notice {
  std::int64_t badPlace = -1;  ///< in topk_idx, of the first id out of range; -1: none
  std::int64_t badId = 0;
  std::uint32_t countsDiffer = 0;  ///< those given from those of the routing
  std::uint32_t dropped = 0;       ///< rows did not fit num_worst_tokens, of this operation
  std::int64_t numRecv = 0;
  std::int64_t numRows = 0;
};

/// The memory that the plans of one buffer work with. The host writes counts in turn with the
/// kernels that read them: it waits for a plan first, which comes behind them.
class PlanReporter {
 public:
  /// Makes it large enough for so many, of a dispatch with so many counts in all.
  void reserve(int numRanks, std::int64_t numExperts, std::int64_t numCounts) {
    const ReportMap map(numRanks, numExperts);
    const Sizes least = rooms_.empty() ? Sizes{} : rooms_.back()->sizes;
    const Sizes wanted =
        least.with({static_cast<std::size_t>(map.size()), static_cast<std::size_t>(numCounts),
                    static_cast<std::size_t>(numExperts) + kScratchHead});
    if (wanted == least) return;
    rooms_.push_back(std::make_unique<Room>(wanted));
    doNow([&](cudaStream_t stream) {
      EP_CUDA_TRY(cudaMemsetAsync(scratch(), 0, wanted.scratch * sizeof(std::int32_t), stream),
                  "cannot clear memory");
    });
  }

  std::uint64_t* report() const { return rooms_.back()->report.get(); }
  Notice* notice() const { return notice_.get(); }
  /// Those of a dispatch, for pushRows(); null if none was planned.
  std::int32_t* hostCounts() const {
    return rooms_.empty() ? nullptr : rooms_.back()->hostCounts.get();
  }
  std::int32_t* scratch() const { return rooms_.back()->scratch.get(); }
  /// Of the last plan.
  std::uint64_t ticket() const { return ticket_; }
  std::uint64_t nextTicket() { return ++ticket_; }

  /// Words of the scratch before the counts of choices: blocks done, and a place in 64 bits.
  static constexpr std::size_t kScratchHead = 4;

 private:
  struct Sizes {
    std::size_t report = 0;
    std::size_t hostCounts = 0;
    std::size_t scratch = 0;

    /// What has room for both.
    Sizes with(const Sizes& other) const {
      return {std::max(report, other.report), std::max(hostCounts, other.hostCounts),
              std::max(scratch, other.scratch)};
    }
    bool operator==(const Sizes&) const = default;
  };
  struct Room {
    explicit Room(const Sizes& wanted)
        : sizes(wanted),
          report(wanted.report),
          hostCounts(wanted.hostCounts),
          scratch(wanted.scratch) {}

    Sizes sizes;
    Mapped<std::uint64_t> report;
    Mapped<std::int32_t> hostCounts;
    DeviceArray<std::int32_t> scratch;
  };

  std::uint64_t ticket_ = 0;
  std::vector<std::unique_ptr<Room>> rooms_;  ///< also those too small: graphs refer to them
  Mapped<Notice> notice_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PLAN_REPORT_HPP_
