// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_PEER_ORDER_HPP_
#define MSCCLPP_EP_CUDA_PEER_ORDER_HPP_

#include <chrono>
#include <cstdint>
#include <memory>

#include "cuda/mapped.hpp"
#include "cuda/order.hpp"
#include "cuda/resources.hpp"
#include "host/arena.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep::cuda {

/// What orders the kernels of the ranks: owns what an Order points to.
class PeerOrder {
 public:
  /// Takes the first memory that the transport shares, so that peers know its number.
  PeerOrder(Transport& transport, std::uint64_t firstEpoch, std::chrono::duration<double> timeout);
  /// Finds the memory of the peers, once all of them have taken theirs.
  void connect(Transport& transport);

  const Order& arguments() const { return order_; }

  // Memory behind the words, zero.
  static constexpr std::size_t kFlagBytes = std::size_t{1} << 20;
  static constexpr std::size_t kPacketBytes = std::size_t{1} << 18;
  ArenaBlock flags() const { return part(flagsAt_); }
  ArenaBlock packets() const { return part(flagsAt_ + kFlagBytes); }

  /// Ends all waits of kernels of this rank, now and later.
  void abort() noexcept { __atomic_store_n(abort_.get(), 1U, __ATOMIC_RELEASE); }
  /// Throws Timeout if a kernel has waited in vain, naming whom it waited for, PeerFailure if a row
  /// was damaged.
  void throwIfFailed() const;

 private:
  ArenaBlock part(std::size_t offset) const;

  Mapped<std::uint32_t> abort_;
  Mapped<WaitFailure> failure_;
  std::size_t flagsAt_;
  SharedBlock signals_;
  DeviceArray<std::uint64_t> epoch_;
  DeviceArray<unsigned> blocksDone_;
  DeviceArray<unsigned> damaged_;
  DeviceArray<std::uint64_t*> peers_;
  double timeout_;
  Order order_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PEER_ORDER_HPP_
