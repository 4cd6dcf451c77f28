// SPDX-License-Identifier: MIT
#include "cpu/host_pool.hpp"

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <vector>

#include "core/check.hpp"
#include "core/memory_map.hpp"
#include "transport/memory_limit.hpp"

namespace mscclpp_ep::cpu {

namespace {

// Below this, asking how much memory is free costs more than it can save.
constexpr std::size_t kWorthAsking = std::size_t{1} << 20;

std::byte* mapOrdinary(std::size_t bytes) {
  if (bytes >= kWorthAsking) requireMemory(static_cast<std::int64_t>(bytes), "an output");
  void* data =
      EP_SYS_TRY(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
                 "cannot take ", bytes, " bytes of memory");
  if (bytes >= kWorthAsking) ::madvise(data, bytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(data);
}

}  // namespace

/// Lives as long as the pool or any block of it.
struct HostPool::Shelves {
  Shelves() = default;
  Shelves(const Shelves&) = delete;
  Shelves& operator=(const Shelves&) = delete;
  ~Shelves() {
    for (const auto& [bytes, blocks] : kept) {
      for (std::byte* block : blocks) ::munmap(block, bytes);
    }
  }

  std::mutex mutex;
  std::map<std::size_t, std::vector<std::byte*>> kept;  ///< hottest last
  std::size_t total = 0;
};

HostPool::HostPool() : shelves_(std::make_shared<Shelves>()) {}

std::shared_ptr<std::byte> HostPool::allocate(std::size_t wanted) {
  const std::size_t bytes = blockBytes(wanted);
  std::byte* block = nullptr;
  {
    const std::lock_guard lock(shelves_->mutex);
    auto& blocks = shelves_->kept[bytes];
    if (!blocks.empty()) {
      block = blocks.back();
      blocks.pop_back();
    }
  }
  if (block == nullptr) {
    block = mapOrdinary(bytes);
    const std::lock_guard lock(shelves_->mutex);
    shelves_->total += bytes;
  }
  return {block, [shelves = shelves_, bytes](std::byte* data) {
            const std::lock_guard lock(shelves->mutex);
            shelves->kept[bytes].push_back(data);
          }};
}

std::int64_t HostPool::bytes() const {
  const std::lock_guard lock(shelves_->mutex);
  return static_cast<std::int64_t>(shelves_->total);
}

}  // namespace mscclpp_ep::cpu
