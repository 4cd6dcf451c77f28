// SPDX-License-Identifier: MIT
#include "cpu/low_latency.hpp"

#include "transport/memory_limit.hpp"

namespace mscclpp_ep::cpu {

void Staging::reserve(std::size_t bytes) {
  if (bytes <= block_.bytes) return;
  const std::size_t wanted = blockBytes(bytes);
  requireMemory(static_cast<std::int64_t>(wanted), "what a low-latency operation sends");
  SharedBlock larger = transport_.share(wanted);
  if (block_.data != nullptr) transport_.unshare(block_.id);
  block_ = std::move(larger);
}

void LowLatencyLane::noteReaders() {
  for (int peer = 0; peer < context.size(); ++peer) {
    if (peer == context.rank() || context.masked(peer)) continue;
    told[static_cast<std::size_t>(peer)] = context.epoch;
  }
}

void LowLatencyLane::awaitReaders() {
  const TraceScope scope(context.trace, "await readers");
  const auto late = [&] {
    Awaited readers{{}, "the reading of what was sent before"};
    for (int peer = 0; peer < context.size(); ++peer) {
      const std::uint64_t epoch = told[static_cast<std::size_t>(peer)];
      if (epoch == 0 || context.masked(peer)) continue;
      if (!context.hasRaisedSince(kRowsRead, peer, epoch)) readers.ranks.push_back(peer);
    }
    return readers;
  };
  context.transport.wait([&] { return late().ranks.empty(); }, late);
}

void LowLatencyLane::raiseRead() {
  for (int peer = 0; peer < context.size(); ++peer) {
    if (peer != context.rank()) context.raise(kRowsRead, peer, 0);
  }
}

}  // namespace mscclpp_ep::cpu
