// SPDX-License-Identifier: MIT
// Ranks that a buffer with enable_shrink goes on without: those that its kernels have waited for in
// vain, and those that its host has masked. Each side is told of the other's.
#ifndef MSCCLPP_EP_CUDA_LOSSES_HPP_
#define MSCCLPP_EP_CUDA_LOSSES_HPP_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "cuda/peer_order.hpp"
#include "cuda/shrink.hpp"
#include "cuda/streams.hpp"
#include "host/arena.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep::cuda {

/// Memory that peers write to in an operation.
struct PeerWritten {
  std::vector<const void*> blocks;  ///< somewhere in each
  bool landing = false;             ///< the landing block, too
};

class Losses {
 public:
  Losses(PeerOrder& order, Transport& transport, Arena& arena);

  /// Masks the ranks that kernels have lost since, and sees to it that what they may still write to
  /// is not given out again.
  void learn();
  /// Lets the kernels that are enqueued next go on without the ranks that are masked.
  void tell(cudaStream_t stream, bool capturing);
  /// Looks for ranks that have died or given up, while the host waits for the GPU, and ends waits
  /// of kernels for them.
  void watch();
  /// Waits until the landing block is not written to any more, so that it is known who may still:
  /// the next operation does not wait for a rank that an earlier one has lost.
  void settleLanding(const std::function<void()>& look);
  /// An operation has been enqueued.
  void note(PeerWritten written, cudaStream_t stream, bool capturing);

  /// The host has masked a rank by hand, or has taken one in again. No kernel is running.
  void set(int rank, bool masked);

  /// HostContext::gpuEpoch, if ranks have been taken in since the epochs were aligned. No kernel is
  /// running.
  std::uint64_t epochToTell() const { return aligns_ ? order_.readEpoch() : 0; }
  bool aligns() const { return aligns_; }
  /// The epoch of the operation that is enqueued next, where ranks have told of theirs.
  void align(std::uint64_t highest, cudaStream_t stream, bool capturing);

  Places places() const { return order_.places(); }

 private:
  struct Operation {
    Operation(PeerWritten memory, cudaStream_t stream) : written(std::move(memory)), done(stream) {}
    PeerWritten written;
    StreamEvent done;
  };

  void endWaits();
  bool learnRanks();
  void quarantine(const PeerWritten& written);
  template <typename Enqueue>
  void enqueue(cudaStream_t stream, bool capturing, const Enqueue& work) const;

  PeerOrder& order_;
  Transport& transport_;
  Arena& arena_;
  std::vector<bool> byHand_;          ///< masked by the caller: kernels under way end with the rank
  std::vector<bool> onGpu_;           ///< what kernels that are enqueued go on without
  std::vector<bool> known_;           ///< which losses of kernels the host has dealt with
  std::deque<Operation> operations_;  ///< that peers may have written to since the host looked last
  PeerWritten captured_;              ///< of all graphs
  std::set<const void*> capturedBlocks_;
  bool aligns_ = false;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_LOSSES_HPP_
