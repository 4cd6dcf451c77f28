// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_HOST_CONTEXT_HPP_
#define MSCCLPP_EP_HOST_CONTEXT_HPP_

#include <cstdint>
#include <string>

#include "core/agreement.hpp"
#include "core/memory_map.hpp"
#include "host/arena.hpp"
#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/error.hpp"
#include "transport/mailbox.hpp"
#include "transport/trace.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep {

/// The parts of a rank that its operations work with, wherever rows are.
struct HostContext {
  Transport& transport;
  Mailbox& mailbox;
  Arena& arena;
  BufferStats& stats;
  Trace& trace;
  std::uint64_t bufferId = 0;
  std::uint64_t epoch = 0;  ///< of the current operation
  Lane lane = Lane::highThroughput;
  bool shrink = false;     ///< go on without ranks that fail
  bool integrity = false;  ///< rows carry what they are checked by
  /// The epoch of this rank's GPU, if it is to be told in the next entry, where ranks meet again
  /// that were apart; else 0. Once all have entered, the highest that any has told.
  std::uint64_t gpuEpoch = 0;

  int rank() const { return transport.rank(); }
  int size() const { return transport.size(); }

  bool masked(int peer) const { return transport.masked(peer); }
  bool masked(std::size_t peer) const { return masked(static_cast<int>(peer)); }

  /// As Transport::requireNobodyGaveUp, but where ranks are masked that only ends the operation.
  void requireNobodyGaveUp() const {
    try {
      transport.requireNobodyGaveUp();
    } catch (const PeerFailure&) {
      if (!shrink) throw;
      throw OperationRefused{std::current_exception()};
    }
  }

  /// Raises a progress word at `peer`: `rows` so far in this operation.
  /// A masked peer may still wait for the word of an operation before: that one stays.
  void raise(Progress which, int peer, std::int64_t rows) const {
    if (masked(peer)) return;
    word(peer, which, rank()).store(packCount(static_cast<std::int32_t>(rows), epoch));
    transport.ring(peer);
  }
  /// Rows that `peer` has raised at this rank in this operation; -1: no word of it yet.
  std::int64_t raised(Progress which, int peer) const {
    const std::uint64_t signal = word(rank(), which, peer).load();
    const bool current = signalTag(signal) == static_cast<std::uint32_t>(epoch);
    return current ? signalCount(signal) : -1;
  }
  /// Whether `peer` has raised a word at this rank in operation `past` or a later one.
  bool hasRaisedSince(Progress which, int peer, std::uint64_t past) const {
    const std::uint64_t signal = word(rank(), which, peer).load();
    const auto ahead = signalTag(signal) - static_cast<std::uint32_t>(past);
    return signalValue(signal) != 0 && static_cast<std::int32_t>(ahead) >= 0;
  }

 private:
  SharedWord& word(int owner, Progress which, int writer) const {
    const ControlMap map(size());
    return sharedWord(transport.control(owner), map.progress(lane, which, writer));
  }
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_CONTEXT_HPP_
