// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_CONTEXT_HPP_
#define MSCCLPP_EP_CUDA_CONTEXT_HPP_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "cuda/kernels.hpp"
#include "cuda/losses.hpp"
#include "cuda/order.hpp"
#include "cuda/peer_memory.hpp"
#include "cuda/resources.hpp"
#include "cuda/streams.hpp"
#include "host/context.hpp"

namespace mscclpp_ep::cuda {

/// To which regions of a landing block are aligned: that of any vector.
inline constexpr std::size_t kRegionAlignment = 128;

/// What moves rows on a GPU.
struct Movers {
  int device;
  DevicePool& pool;
  cudaStream_t stream;  ///< on which work is enqueued: that of operations, or a caller's behind it
  bool capturing;       ///< for a graph, instead of run
  Order order;
  Notice* notice;            ///< for what goes wrong on the GPU
  std::int32_t* hostCounts;  ///< room for those of a dispatch that was planned; or null
  PeerMemory& flags;         ///< of rows that peers push here
  PeerMemory& packets;       ///< of counts
  std::uint64_t* nextChunk;  ///< in device memory, 0 between kernels
  const std::function<void()>& pollInterrupt;
  int numSms;      ///< that a kernel may use
  Losses* losses;  ///< null: the buffer goes on without no rank
};

/// The parts of a rank that its operations work with.
struct Context : HostContext, Movers {
  Context(const HostContext& host, const Movers& movers) : HostContext(host), Movers(movers) {}

  /// Whether the operation may have to go on without other ranks.
  bool mayLose() const { return losses != nullptr && size() > 1; }

  /// What comes first of an operation on the GPU, once the hosts have agreed on it.
  void meetRanks() const {
    if (!mayLose()) return;
    losses->align(gpuEpoch, stream, capturing);
    losses->tell(stream, capturing);
  }

  /// Before the landing block is used.
  void settleLanding() const {
    if (capturing) return arena.keepLanding();
    if (mayLose()) losses->settleLanding(pollInterrupt);
  }

  Device onDevice() const { return {DeviceType::cuda, device}; }

  /// Ordinary memory for this operation. A graph that is captured keeps it.
  std::shared_ptr<std::byte> take(std::size_t bytes) const { return keep(pool.allocate(bytes)); }
  template <typename T>
  std::shared_ptr<T> keep(std::shared_ptr<T> owner) const {
    if (capturing) keepWithGraph(stream, owner);
    return owner;
  }
  /// Takes memory for so many tables of perRank(), while no kernel of a peer waits for this rank:
  /// to take memory may wait for the GPU.
  void reserveTables(int count) {
    if (size() <= PerRank<int>::kMost) return;
    for (int i = 0; i < count; ++i) {
      tables_.push_back(take(static_cast<std::size_t>(size()) * kTableBytes));
    }
  }
  /// For the arguments of a kernel: a few in them, more in memory, which lives as long as this.
  template <typename T>
  PerRank<T> perRank(const std::vector<T>& values) {
    PerRank<T> result;
    if (values.size() <= PerRank<T>::kMost) {
      std::copy(values.begin(), values.end(), result.few);
      return result;
    }
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(std::int32_t) == 0);
    static_assert(sizeof(T) <= kTableBytes);
    const auto words = static_cast<std::int64_t>(values.size() * sizeof(T) / sizeof(std::int32_t));
    const std::shared_ptr<std::byte>& memory = tables_.at(numTables_++);
    storeValues(reinterpret_cast<std::int32_t*>(memory.get()),
                reinterpret_cast<const std::int32_t*>(values.data()), words, stream);
    result.many = reinterpret_cast<const T*>(memory.get());
    return result;
  }

 private:
  static constexpr std::size_t kTableBytes = 128;  ///< of a rank

  std::vector<std::shared_ptr<std::byte>> tables_;
  std::size_t numTables_ = 0;
};

/// The largest of 16, 8, 4, 2 and 1 that divides all addresses and sizes added.
class Alignment {
 public:
  static constexpr int kMost = 16;

  void add(const void* data) { bits_ |= reinterpret_cast<std::uintptr_t>(data); }
  void add(std::int64_t bytes) { bits_ |= static_cast<std::uintptr_t>(bytes); }
  int value() const {
    int result = kMost;
    while ((bits_ & static_cast<std::uintptr_t>(result - 1)) != 0) result /= 2;
    return result;
  }

 private:
  std::uintptr_t bits_ = 0;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_CONTEXT_HPP_
