// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_PEER_MEMORY_HPP_
#define MSCCLPP_EP_CUDA_PEER_MEMORY_HPP_

#include <algorithm>
#include <cstddef>
#include <utility>
#include <vector>

#include "host/arena.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

/// Memory for what peers write here of one kind, flags or packets: zero at first, and nothing else
/// ever.
class PeerMemory {
 public:
  /// Begins with memory that is zero.
  PeerMemory(ArenaBlock first, std::size_t bytes) { blocks_.push_back({std::move(first), bytes}); }

  /// So many bytes. Throws SystemError if there is not so much memory.
  const ArenaBlock& reserve(Arena& arena, std::size_t bytes, cudaStream_t stream, bool capturing) {
    if (bytes > blocks_.back().bytes) add(arena, bytes, stream, capturing);
    return blocks_.back().block;
  }

 private:
  struct Part {
    ArenaBlock block;
    std::size_t bytes;
  };

  void add(Arena& arena, std::size_t bytes, cudaStream_t stream, bool capturing) {
    EP_EXPECTS(
        !capturing,
        "an operation of so many tokens or experts has to be made once before it is captured");
    // Twice as many as before, so that there are few blocks.
    const std::size_t wanted = std::max(bytes, 2 * blocks_.back().bytes);
    ArenaBlock block = arena.shareBeside(wanted);
    EP_CUDA_TRY(cudaMemsetAsync(block.data.get(), 0, wanted, stream), "cannot clear memory");
    blocks_.push_back({std::move(block), wanted});
  }

  std::vector<Part> blocks_;  ///< also those too small: graphs refer to them
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PEER_MEMORY_HPP_
