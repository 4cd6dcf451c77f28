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

void LowLatencyLane::awaitReaders() {
  if (stagedEpoch == 0) return;
  const TraceScope scope(context.trace, "await readers");
  const auto late = [&] {
    Awaited readers{{}, "the reading of what was sent before"};
    for (int peer = 0; peer < context.size(); ++peer) {
      if (peer == context.rank() || context.masked(peer)) continue;
      if (!context.hasRaisedSince(kRowsRead, peer, stagedEpoch)) readers.ranks.push_back(peer);
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
