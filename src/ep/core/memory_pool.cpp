// SPDX-License-Identifier: MIT
#include "mscclpp_ep/memory_pool.hpp"

#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "core/block_allocator.hpp"
#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

/// The memory of one pool. It is free for another pool when it is closed and all is given back.
class Slot {
 public:
  bool open(Tensor& memory) {
    const std::lock_guard lock(mutex_);
    if (memory_.view || !used_.empty()) return false;
    blocks_ = BlockAllocator();
    blocks_.addSegment(0, numBytes(memory.view));
    memory_ = std::move(memory);
    closed_ = false;
    return true;
  }

  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    letGo();
  }

  void* allocate(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    if (closed_) return nullptr;
    const auto block = blocks_.allocate(bytes);
    if (!block) return nullptr;
    void* data = static_cast<std::byte*>(memory_.view.data) + block->offset;
    used_.emplace(data, *block);
    return data;
  }

  void release(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    if (found == used_.end()) return;
    blocks_.release(found->second);
    used_.erase(found);
    letGo();
  }

  std::size_t usedBytes() {
    const std::lock_guard lock(mutex_);
    return blocks_.usedBytes();
  }

 private:
  void letGo() {
    if (closed_ && used_.empty()) memory_ = {};
  }

  std::mutex mutex_;
  Tensor memory_;
  BlockAllocator blocks_;
  std::map<void*, BlockRange> used_;
  bool closed_ = true;
};

/// Never destroyed: a framework may give memory back at the very end of the process.
Slot& slotOf(int index) {
  static auto& slots = *new std::array<Slot, MemoryPool::kMost>;
  return slots[static_cast<std::size_t>(index)];
}

int openSlot(Tensor memory) {
  for (int index = 0; index < MemoryPool::kMost; ++index) {
    if (slotOf(index).open(memory)) return index;
  }
  throw InvalidArgument(
      cat("there are ", MemoryPool::kMost, " pools of memory in use, and there may be no more"));
}

}  // namespace

MemoryPool::MemoryPool(Tensor memory) : slot_(openSlot(std::move(memory))) {}
MemoryPool::~MemoryPool() { slotOf(slot_).close(); }
std::string MemoryPool::allocateName() const { return cat("mscclpp_ep_pool_allocate_", slot_); }
std::string MemoryPool::freeName() const { return cat("mscclpp_ep_pool_free_", slot_); }
std::size_t MemoryPool::usedBytes() const { return slotOf(slot_).usedBytes(); }

// Functions of C are told apart by their names only.
#define EP_POOL_FUNCTIONS(slot)                                                                    \
  extern "C" MSCCLPP_EP_API void* mscclpp_ep_pool_allocate_##slot(std::size_t bytes, int, void*) { \
    return slotOf(slot).allocate(bytes);                                                           \
  }                                                                                                \
  extern "C" MSCCLPP_EP_API void mscclpp_ep_pool_free_##slot(void* data, std::size_t, int,         \
                                                             void*) {                              \
    slotOf(slot).release(data);                                                                    \
  }
EP_POOL_FUNCTIONS(0)
EP_POOL_FUNCTIONS(1)
EP_POOL_FUNCTIONS(2)
EP_POOL_FUNCTIONS(3)
EP_POOL_FUNCTIONS(4)
EP_POOL_FUNCTIONS(5)
EP_POOL_FUNCTIONS(6)
EP_POOL_FUNCTIONS(7)
#undef EP_POOL_FUNCTIONS
static_assert(MemoryPool::kMost == 8);

}  // namespace mscclpp_ep
