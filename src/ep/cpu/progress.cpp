// SPDX-License-Identifier: MIT
#include "cpu/progress.hpp"

#include <vector>

namespace mscclpp_ep::cpu {

Awaited missingRows(const HostContext& context, Progress which,
                    std::span<const std::int64_t> needed, const char* what) {
  Awaited late{{}, what};
  for (int peer = 0; peer < context.size(); ++peer) {
    if (peer == context.rank() || context.masked(peer)) continue;
    const bool raised = context.raised(which, peer) >= needed[static_cast<std::size_t>(peer)];
    if (!raised) late.ranks.push_back(peer);
  }
  return late;
}

void finishReading(const HostContext& context) {
  const TraceScope scope(context.trace, "await readers");
  for (int peer = 0; peer < context.size(); ++peer) {
    if (peer != context.rank()) context.raise(kRowsRead, peer, 0);
  }
  const std::vector<std::int64_t> none(static_cast<std::size_t>(context.size()));
  const auto late = [&] {
    return missingRows(context, kRowsRead, none, "the reading of this rank's rows");
  };
  context.transport.wait([&] { return late().ranks.empty(); }, late);
}

}  // namespace mscclpp_ep::cpu
