// SPDX-License-Identifier: MIT
#include "cuda/resources.hpp"

#include "core/memory_map.hpp"

namespace mscclpp_ep::cuda {

/// Blocks by size: those that are free, and those that the GPU may still use.
struct DevicePool::Shelves {
  ~Shelves() {
    for (const auto* blocks : {&settled, &dropped}) {
      for (const auto& block : *blocks) (void)cudaFree(block.second);
    }
  }

  std::byte* take(std::size_t size) {
    const std::lock_guard lock(mutex);
    const auto found = settled.find(size);
    if (found == settled.end()) return nullptr;
    std::byte* data = found->second;
    settled.erase(found);
    return data;
  }

  /// True if there is a dropped block of a size.
  bool hasDropped(std::size_t size) {
    const std::lock_guard lock(mutex);
    return dropped.contains(size);
  }

  /// Waits for the GPU without the lock, which callers may want in order to drop more.
  void settleDropped() {
    std::multimap<std::size_t, std::byte*> waiting;
    {
      const std::lock_guard lock(mutex);
      waiting.swap(dropped);
    }
    settle();
    const std::lock_guard lock(mutex);
    settled.merge(waiting);
  }

  mutable std::mutex mutex;
  std::multimap<std::size_t, std::byte*> settled;
  std::multimap<std::size_t, std::byte*> dropped;
  std::int64_t bytes = 0;
};

DevicePool::DevicePool() : shelves_(std::make_shared<Shelves>()) {}

std::shared_ptr<std::byte> DevicePool::allocate(std::size_t bytes) {
  const std::size_t size = blockBytes(std::max<std::size_t>(bytes, 1));
  std::byte* data = shelves_->take(size);
  if (data == nullptr && shelves_->hasDropped(size)) {
    shelves_->settleDropped();
    data = shelves_->take(size);
  }
  if (data == nullptr) {
    void* fresh = nullptr;
    if (cudaMalloc(&fresh, size) != cudaSuccess) {
      (void)cudaGetLastError();
      throw SystemError(cat("the operation needs ", size,
                            " bytes of GPU memory, and there are not "
                            "so many"));
    }
    data = static_cast<std::byte*>(fresh);
    const std::lock_guard lock(shelves_->mutex);
    shelves_->bytes += static_cast<std::int64_t>(size);
  }
  return {data, [shelves = shelves_, size](std::byte* block) {
            const std::lock_guard lock(shelves->mutex);
            shelves->dropped.emplace(size, block);
          }};
}

std::int64_t DevicePool::bytes() const {
  const std::lock_guard lock(shelves_->mutex);
  return shelves_->bytes;
}

}  // namespace mscclpp_ep::cuda
