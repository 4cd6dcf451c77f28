// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_CONTEXT_HPP_
#define MSCCLPP_EP_CPU_CONTEXT_HPP_

#include "cpu/host_pool.hpp"
#include "cpu/simd.hpp"
#include "cpu/workers.hpp"
#include "host/context.hpp"

namespace mscclpp_ep::cpu {

/// What moves rows on the CPU.
struct Movers {
  HostPool& pool;
  Workers& workers;
  const RowKernels& kernels;
};

/// The parts of a rank that its operations work with.
struct Context : HostContext, Movers {
  Context(const HostContext& host, const Movers& movers) : HostContext(host), Movers(movers) {}

  /// The same parts, on a lane with a mailbox of its own.
  Context onLane(Mailbox& itsMailbox, Lane which) const {
    return {{transport, itsMailbox, arena, stats, trace, bufferId, 0, which, shrink, integrity},
            *this};
  }
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_CONTEXT_HPP_
