// SPDX-License-Identifier: MIT
// How the memory of the other ranks of a domain is reached. Knows nothing of tokens or experts.
#ifndef MSCCLPP_EP_TRANSPORT_TRANSPORT_HPP_
#define MSCCLPP_EP_TRANSPORT_TRANSPORT_HPP_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transport/wait.hpp"

namespace mscclpp_ep {

/// Who is waited for, and for what of theirs.
struct Awaited {
  std::vector<int> ranks;
  const char* what = "";
};
/// "the rows of ranks 1, 3"
std::string toString(const Awaited& awaited);

/// Memory of this rank's that peers can map by its id.
struct SharedBlock {
  std::uint32_t id = 0;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::shared_ptr<void> owner;  ///< keeps the memory mapped, also after the transport has gone
};

class Transport {
 public:
  Transport() = default;
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  virtual ~Transport() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int ranksOnHost() const = 0;

  /// The control segment of `peer` (core/memory_map.hpp says what is where), mapped here.
  virtual std::byte* control(int peer) const = 0;
  /// Keeps it mapped.
  virtual std::shared_ptr<const void> controlOwner(int peer) const = 0;
  /// Wakes `peer` after a store to its control segment.
  virtual void ring(int peer) = 0;

  /// Bytes that share() can take now.
  virtual std::int64_t shareableBytes() const = 0;
  /// Shares new memory with every peer.
  virtual SharedBlock share(std::size_t bytes) = 0;
  /// Lets peers forget memory that was shared. None of them may be using it.
  virtual void unshare(std::uint32_t id) = 0;
  /// Whether what peers have unshared stays mapped for now.
  virtual void keepUnshared(bool keep) { (void)keep; }
  /// Bytes of a peer's shared memory, mapped here. Throws PeerFailure if there are none such.
  virtual std::byte* peerMemory(int peer, std::uint32_t id, std::uint64_t offset,
                                std::size_t bytes) = 0;

  /// Names what the next waits belong to, for their messages.
  virtual void beginOperation(const char* name, std::uint64_t epoch) = 0;

  /// Lets the peers know that this rank begins its next collective call, of such a mode (not 0). In
  /// waits, a rank that is in the same call with another mode is an error: it will never answer.
  virtual void enterCall(std::uint32_t mode) = 0;

  /// Returns when `ready()` is true. Throws Timeout if that takes too long, and PeerFailure if a
  /// rank of `missing()`, an Awaited, is gone or any rank has given up. What pollInterrupt throws
  /// passes.
  template <typename Ready, typename Missing>
  void wait(const Ready& ready, const Missing& missing) {
    if (spinUntil(ready, spinLimit_)) return;
    waitAsleep(std::cref(ready), std::cref(missing));
  }

  /// Whether this rank goes on without `peer`: it sends it nothing, and waits for nothing of its.
  virtual bool masked(int peer) const = 0;
  /// Masks a peer, which is told, or takes it in again. Throws PeerFailure for one that is gone.
  virtual void setMask(int peer, bool masked) = 0;
  /// Masks the ranks that have died, given up or masked this one, where ranks are masked: for who
  /// waits for a rank otherwise than by wait().
  virtual void maskFailed() {}
  /// Whether a masked peer may still write to memory that it was told of before.
  virtual bool mayStillWrite(int peer) const = 0;

  /// Throws PeerFailure if a peer has given up in this operation: what was read from its memory
  /// since may be anything.
  virtual void requireNobodyGaveUp() = 0;

  /// Tells the peers that this rank has failed and takes part in nothing any more.
  virtual void giveUp() noexcept = 0;
  /// Tells the peers that this rank goes, and waits until all have said so or are gone. Throws
  /// Timeout.
  virtual void leave() = 0;

 protected:
  virtual void waitAsleep(const std::function<bool()>& ready,
                          const std::function<Awaited()>& missing) = 0;

  std::chrono::nanoseconds spinLimit_{};
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_TRANSPORT_HPP_
