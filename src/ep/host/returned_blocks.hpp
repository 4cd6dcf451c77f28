// SPDX-License-Identifier: MIT
// Memory that users have let go of, and that may still be in use.
#ifndef MSCCLPP_EP_HOST_RETURNED_BLOCKS_HPP_
#define MSCCLPP_EP_HOST_RETURNED_BLOCKS_HPP_

#include <functional>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace mscclpp_ep {

/// What has to pass before memory that was dropped may be used again.
class Fence {
 public:
  Fence() = default;
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  virtual ~Fence() = default;
  /// True if it has passed, or will have before the next user of the memory gets to it.
  virtual bool passed() = 0;
};

/// Makes a fence behind all that uses memory now; null if that cannot be told now.
using MakeFence = std::function<std::unique_ptr<Fence>()>;

/// Where blocks go when they are dropped, which may happen in any thread, at any time.
template <typename Block>
class ReturnedBlocks {
 public:
  void add(Block block) {
    const std::lock_guard lock(mutex_);
    dropped_.push_back(std::move(block));
  }

  /// Makes those that were dropped free: whoever is next to use them comes after all that has.
  void freeDropped() {
    const std::lock_guard lock(mutex_);
    free_.insert(free_.end(), dropped_.begin(), dropped_.end());
    dropped_.clear();
  }

  /// Those that nobody uses any more; without `makeFence`, all.
  std::vector<Block> collect(const MakeFence& makeFence) {
    const std::lock_guard lock(mutex_);
    if (!makeFence) return std::exchange(dropped_, {});
    if (!dropped_.empty()) {
      if (auto fence = makeFence()) {
        fenced_.push_back({std::move(fence), std::exchange(dropped_, {})});
      }
    }
    for (auto batch = fenced_.begin(); batch != fenced_.end();) {
      const bool passed = batch->fence->passed();  // or throws, and what was found is kept
      if (passed) free_.insert(free_.end(), batch->blocks.begin(), batch->blocks.end());
      batch = passed ? fenced_.erase(batch) : std::next(batch);
    }
    return std::exchange(free_, {});
  }

  /// All of them, in use or not.
  std::vector<Block> takeAll() {
    const std::lock_guard lock(mutex_);
    std::vector<Block> all = std::exchange(dropped_, {});
    all.insert(all.end(), free_.begin(), free_.end());
    free_.clear();
    for (const Fenced& batch : std::exchange(fenced_, {})) {
      all.insert(all.end(), batch.blocks.begin(), batch.blocks.end());
    }
    return all;
  }

 private:
  struct Fenced {
    std::unique_ptr<Fence> fence;
    std::vector<Block> blocks;
  };

  std::mutex mutex_;
  std::vector<Block> dropped_;
  std::list<Fenced> fenced_;
  std::vector<Block> free_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_RETURNED_BLOCKS_HPP_
