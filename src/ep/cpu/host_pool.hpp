// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_HOST_POOL_HPP_
#define MSCCLPP_EP_CPU_HOST_POOL_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace mscclpp_ep::cpu {

/// Ordinary memory that is kept for reuse when its user lets go of it: in a fresh block of some
/// megabytes the page faults cost more than writing to it does.
class HostPool {
 public:
  HostPool();

  /// At least `bytes`, aligned to a cache line. It may outlive the pool, and any thread may drop
  /// it. Throws SystemError if there is not enough memory.
  std::shared_ptr<std::byte> allocate(std::size_t bytes);

  /// In use or kept.
  std::int64_t bytes() const;

 private:
  struct Shelves;
  std::shared_ptr<Shelves> shelves_;
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_HOST_POOL_HPP_
