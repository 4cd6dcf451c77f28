// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_PEER_ORDER_HPP_
#define MSCCLPP_EP_CUDA_PEER_ORDER_HPP_

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/mapped.hpp"
#include "cuda/order.hpp"
#include "cuda/resources.hpp"
#include "cuda/shrink.hpp"
#include "host/arena.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep::cuda {

/// What orders the kernels of the ranks: owns what an Order points to.
class PeerOrder {
 public:
  /// Takes the first memory that the transport shares, so that peers know its number.
  PeerOrder(Transport& transport, std::uint64_t firstEpoch, std::chrono::duration<double> timeout,
            bool shrink);
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

  // Of a buffer that goes on without ranks:

  /// Whether a kernel has lost a rank since forgetLoss().
  bool hasLost(int rank) const { return acquire(shrinkMemory_->losses.get()[rank]) != 0; }
  void forgetLoss(int rank) { shrinkMemory_->losses.get()[rank] = 0; }
  /// Whether kernels, also those under way, are to wait for a rank no longer.
  void setGone(int rank, bool gone) {
    __atomic_store_n(shrinkMemory_->gone.get() + rank, gone ? 1U : 0U, __ATOMIC_RELEASE);
  }
  Places places() const {
    return {shrinkMemory_->firstRows.get(), shrinkMemory_->numKeptFrom.get()};
  }
  /// Waits for it; no kernel is running.
  std::uint64_t readEpoch() const;
  void writeEpoch(std::uint64_t epoch, cudaStream_t stream) const;

 private:
  struct ShrinkMemory {
    explicit ShrinkMemory(std::size_t numRanks)
        : lost(numRanks),
          gone(numRanks),
          losses(numRanks),
          firstRows(numRanks),
          numKeptFrom(numRanks) {
      lost.write(std::vector<std::uint32_t>(numRanks));
      arguments.write({{lost.get(), gone.get(), losses.get()}});
    }
    DeviceArray<std::uint32_t> lost;
    Mapped<std::uint32_t> gone;
    Mapped<std::uint64_t> losses;
    DeviceArray<std::int32_t> firstRows;
    DeviceArray<std::int32_t> numKeptFrom;
    DeviceArray<Shrinking> arguments{1};
  };

  ArenaBlock part(std::size_t offset) const;

  Mapped<std::uint32_t> abort_;
  Mapped<WaitFailure> failure_;
  std::size_t flagsAt_;
  SharedBlock signals_;
  DeviceArray<std::uint64_t> epoch_;
  DeviceArray<unsigned> blocksDone_;
  DeviceArray<unsigned> damaged_;
  DeviceArray<std::uint64_t*> peers_;
  std::unique_ptr<ShrinkMemory> shrinkMemory_;
  double timeout_;
  Order order_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PEER_ORDER_HPP_
