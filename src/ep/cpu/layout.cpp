// SPDX-License-Identifier: MIT
#include "core/layout.hpp"

#include <algorithm>
#include <mutex>
#include <span>

#include "cpu/dispatch.hpp"

namespace mscclpp_ep::cpu {

namespace {

constexpr std::int64_t kTokensPerPart = 4096;

std::span<std::int32_t> int32Span(const TensorView& tensor) {
  return {static_cast<std::int32_t*>(tensor.data), static_cast<std::size_t>(tensor.shape[0])};
}

/// Counts of the tokens in [begin, end), on their own, then added to the outputs.
template <typename Index>
class PartCounter {
 public:
  PartCounter(const TensorView& topkIdx, const ExpertPlacement& placement,
              const LayoutOutputs& outputs)
      : ids_(static_cast<const Index*>(topkIdx.data)),
        topk_(static_cast<std::size_t>(topkIdx.shape[1])),
        placement_(placement),
        perRank_(int32Span(outputs.numTokensPerRank)),
        perExpert_(int32Span(outputs.numTokensPerExpert)),
        inRank_(static_cast<std::uint8_t*>(outputs.isTokenInRank.data)) {}

  void count(std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> ranks(perRank_.size());
    std::vector<std::int32_t> experts(perExpert_.size());
    const TokenCounts<Index> counts{placement_, ranks, experts};
    for (auto token = static_cast<std::size_t>(begin); token < static_cast<std::size_t>(end);
         ++token) {
      counts.add({ids_ + token * topk_, topk_}, {inRank_ + token * ranks.size(), ranks.size()});
    }
    const std::lock_guard lock(mutex_);
    std::transform(ranks.begin(), ranks.end(), perRank_.begin(), perRank_.begin(), std::plus<>());
    std::transform(experts.begin(), experts.end(), perExpert_.begin(), perExpert_.begin(),
                   std::plus<>());
  }

 private:
  const Index* ids_;
  std::size_t topk_;
  const ExpertPlacement& placement_;
  std::span<std::int32_t> perRank_;
  std::span<std::int32_t> perExpert_;
  std::uint8_t* inRank_;
  std::mutex mutex_;
};

template <typename Index>
void countAll(Workers& workers, const TensorView& topkIdx, const ExpertPlacement& placement,
              const LayoutOutputs& outputs) {
  PartCounter<Index> counter(topkIdx, placement, outputs);
  workers.run(topkIdx.shape[0], kTokensPerPart,
              [&](std::int64_t begin, std::int64_t end) { counter.count(begin, end); });
}

}  // namespace

void countTokens(Workers& workers, const TensorView& topkIdx, const ExpertPlacement& placement,
                 const LayoutOutputs& outputs) {
  std::ranges::fill(int32Span(outputs.numTokensPerRank), 0);
  std::ranges::fill(int32Span(outputs.numTokensPerExpert), 0);
  if (topkIdx.dtype == DataType::int32) {
    countAll<std::int32_t>(workers, topkIdx, placement, outputs);
  } else {
    countAll<std::int64_t>(workers, topkIdx, placement, outputs);
  }
}

}  // namespace mscclpp_ep::cpu
