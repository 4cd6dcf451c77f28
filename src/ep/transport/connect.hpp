// SPDX-License-Identifier: MIT
// How the ranks of one host find and check each other.
#ifndef MSCCLPP_EP_TRANSPORT_CONNECT_HPP_
#define MSCCLPP_EP_TRANSPORT_CONNECT_HPP_

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "mscclpp_ep/bootstrap.hpp"
#include "transport/file_descriptor.hpp"

namespace mscclpp_ep {

/// A way to one peer.
struct PeerLink {
  std::uint64_t localRank = 0;  ///< name in the SegmentRegistry, if a thread of this process
  FileDescriptor socket;        ///< otherwise; also tells of the peer's end
  FileDescriptor process;       ///< readable when the peer's process has ended; may be empty
};

struct ConnectOptions {
  std::string refusal;      ///< why this rank cannot take part; empty if it can
  std::string fingerprint;  ///< must be the same on every rank
  std::uint64_t localRank = 0;
  std::chrono::duration<double> timeout{};
  std::function<void()> pollInterrupt;  ///< may throw, to end a wait; may be empty
};

/// Links to every rank, the own one empty. Either all ranks succeed or all throw: PeerFailure if a
/// rank refused, InvalidArgument if fingerprints differ, NotBuilt if ranks cannot share memory.
std::vector<PeerLink> connectPeers(Bootstrap& bootstrap, const ConnectOptions& options);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_CONNECT_HPP_
