// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_CONTEXT_HPP_
#define MSCCLPP_EP_CUDA_CONTEXT_HPP_

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/resources.hpp"
#include "host/context.hpp"

namespace mscclpp_ep::cuda {

/// What moves rows on a GPU.
struct Movers {
  int device;
  DevicePool& pool;
  const OwnedStream& stream;  ///< on which all of an operation's work is enqueued
  int numSms;                 ///< that a kernel may use
};

/// The parts of a rank that its operations work with.
struct Context : HostContext, Movers {
  Context(const HostContext& host, const Movers& movers) : HostContext(host), Movers(movers) {}

  Device onDevice() const { return {DeviceType::cuda, device}; }
};

/// The largest of 16, 8, 4, 2 and 1 that divides all addresses and sizes added.
class Alignment {
 public:
  void add(const void* data) { bits_ |= reinterpret_cast<std::uintptr_t>(data); }
  void add(std::int64_t bytes) { bits_ |= static_cast<std::uintptr_t>(bytes); }
  int value() const {
    int result = kMost;
    while ((bits_ & static_cast<std::uintptr_t>(result - 1)) != 0) result /= 2;
    return result;
  }

 private:
  static constexpr int kMost = 16;
  std::uintptr_t bits_ = 0;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_CONTEXT_HPP_
