// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_MEMORY_POOL_HPP_
#define MSCCLPP_EP_MEMORY_POOL_HPP_

#include <cstddef>
#include <string>

#include "mscclpp_ep/export.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {

/// Gives out parts of a piece of memory by functions of C that carry nothing but a size, as the
/// allocators of frameworks want them: `void* f(std::size_t bytes, int device, void* stream)` and
/// `void g(void* data, std::size_t bytes, int device, void* stream)`. They may be called by any
/// thread; what they give out keeps the memory, also when this is gone. Streams are the framework's
/// to mind: what it gives back it uses no more.
class MSCCLPP_EP_API MemoryPool {
 public:
  static constexpr int kMost = 8;  ///< that a process may have

  /// `memory` is as Buffer::empty() gives it. Throws InvalidArgument if there are too many pools.
  explicit MemoryPool(Tensor memory);
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  std::string allocateName() const;  ///< of the function in this library; it returns null if full
  std::string freeName() const;
  std::size_t usedBytes() const;

 private:
  int slot_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_MEMORY_POOL_HPP_
