// SPDX-License-Identifier: MIT
// Messages between every two ranks, in order, through slots of the receiver's control segment.
#ifndef MSCCLPP_EP_TRANSPORT_MAILBOX_HPP_
#define MSCCLPP_EP_TRANSPORT_MAILBOX_HPP_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "core/memory_map.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep {

using Message = std::vector<std::byte>;

/// The mailboxes of one lane. A message belongs to a round of an epoch; one of an older round is
/// skipped, as its reader had refused that operation and gone on.
class Mailbox {
 public:
  Mailbox(Transport& transport, Lane lane, std::uint64_t firstSequence);

  /// Posts `outgoing[r]` to each rank r and returns those of all ranks, the own one included; that
  /// of a masked rank is empty. The result is valid until the next call.
  const std::vector<Message>& exchange(std::uint64_t epoch, std::uint32_t round,
                                       const std::vector<Message>& outgoing, const char* what);

  /// Waits for the messages that answer those post()ed last, and returns those of all ranks.
  /// `arrival`, if given, is called with each rank as its message is found. Valid until the next
  /// call.
  const std::vector<Message>& collect(std::uint64_t epoch, std::uint32_t round, const char* what,
                                      const std::function<void(int)>& arrival = {});

  /// After exchange() or collect() has thrown: the message of this rank that had come whole, or
  /// null.
  const Message* received(int rank) const;

  /// Posts without waiting for anybody's answer. Waits only if a peer has not taken the last
  /// kMailboxDepth messages.
  void post(std::uint64_t epoch, std::uint32_t round, const std::vector<Message>& outgoing,
            const char* what);

 private:
  struct Peer {
    std::uint64_t sent = 0;   ///< slots, since the beginning
    std::uint64_t taken = 0;  ///< likewise
    std::size_t postedBytes = 0;
    bool posted = false;    ///< the message of this round, whole
    bool complete = false;  ///< the peer's message of this round has come
  };
  struct Key {
    std::uint64_t epoch;
    std::uint32_t round;
    friend auto operator<=>(const Key&, const Key&) = default;
  };

  void begin(const std::vector<Message>& outgoing);
  bool postSome(int peer, const Message& message, const Key& key);
  void takeSome(int peer, const Key& key, bool skipOnly);
  void takeSlot(int peer, const SlotHeader& header, const std::byte* payload);
  void forgetMasked();
  /// Those without room for this rank's message or, with `answers`, whose own has not come.
  Awaited unfinished(const char* what, bool answers) const;

  Transport& transport_;
  const ControlMap map_;
  const Lane lane_;
  const std::uint64_t firstSequence_;
  std::vector<Peer> peers_;
  std::vector<Message> incoming_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_MAILBOX_HPP_
