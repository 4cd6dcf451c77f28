// SPDX-License-Identifier: MIT
#include "transport/mailbox.hpp"

#include <algorithm>
#include <cstring>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

// Far more than any count of experts needs; a larger one is not a length.
constexpr std::uint64_t kLargestMessage = std::uint64_t{1} << 32;

}  // namespace

Mailbox::Mailbox(Transport& transport, Lane lane, std::uint64_t firstSequence)
    : transport_(transport),
      map_(transport.size()),
      lane_(lane),
      firstSequence_(firstSequence),
      peers_(static_cast<std::size_t>(transport.size())),
      incoming_(peers_.size()) {}

void Mailbox::begin(const std::vector<Message>& outgoing) {
  const auto self = static_cast<std::size_t>(transport_.rank());
  for (std::size_t r = 0; r < peers_.size(); ++r) {
    peers_[r].postedBytes = 0;
    peers_[r].posted = peers_[r].complete = r == self;
    incoming_[r].clear();
  }
  incoming_[self] = outgoing[self];
}

const std::vector<Message>& Mailbox::exchange(std::uint64_t epoch, std::uint32_t round,
                                              const std::vector<Message>& outgoing,
                                              const char* what) {
  begin(outgoing);
  const Key key{epoch, round};
  const auto done = [&] {
    bool all = true;
    for (int r = 0; r < transport_.size(); ++r) {
      const auto index = static_cast<std::size_t>(r);
      Peer& peer = peers_[index];
      if (transport_.masked(r)) continue;
      if (!peer.posted) peer.posted = postSome(r, outgoing[index], key);
      if (!peer.complete) takeSome(r, key, false);
      all = all && peer.posted && peer.complete;
    }
    return all;
  };
  transport_.wait(done, [&] { return unfinished(what, true); });
  forgetMasked();
  return incoming_;
}

const std::vector<Message>& Mailbox::collect(std::uint64_t epoch, std::uint32_t round,
                                             const char* what,
                                             const std::function<void(int)>& arrival) {
  const Key key{epoch, round};
  const auto done = [&] {
    bool all = true;
    for (int r = 0; r < transport_.size(); ++r) {
      Peer& peer = peers_[static_cast<std::size_t>(r)];
      if (peer.complete || transport_.masked(r)) continue;
      takeSome(r, key, false);
      all = all && peer.complete;
      if (peer.complete && arrival) arrival(r);
    }
    return all;
  };
  transport_.wait(done, [&] { return unfinished(what, true); });
  forgetMasked();
  return incoming_;
}

const Message* Mailbox::received(int rank) const {
  const auto index = static_cast<std::size_t>(rank);
  return peers_[index].complete ? &incoming_[index] : nullptr;
}

void Mailbox::post(std::uint64_t epoch, std::uint32_t round, const std::vector<Message>& outgoing,
                   const char* what) {
  begin(outgoing);
  const Key key{epoch, round};
  const auto done = [&] {
    bool all = true;
    for (int r = 0; r < transport_.size(); ++r) {
      const auto index = static_cast<std::size_t>(r);
      if (peers_[index].posted || transport_.masked(r)) continue;
      // Older messages are taken away, lest the peer wait for room while it is waited for.
      takeSome(r, key, true);
      peers_[index].posted = postSome(r, outgoing[index], key);
      all = all && peers_[index].posted;
    }
    return all;
  };
  transport_.wait(done, [&] { return unfinished(what, false); });
}

/// Fills the slots that are free. True when the whole message has been posted.
bool Mailbox::postSome(int rank, const Message& message, const Key& key) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  std::byte* control = transport_.control(rank);
  const SharedWord& consumed =
      sharedWord(transport_.control(transport_.rank()), map_.consumed(lane_, rank));
  do {
    if (peer.sent - consumed.load() >= kMailboxDepth) return false;
    const std::uint64_t sequence = firstSequence_ + peer.sent;
    std::byte* slot = control + map_.slot(lane_, transport_.rank(), sequence);
    const std::size_t bytes = std::min(message.size() - peer.postedBytes, kSlotPayload);
    auto& header = *reinterpret_cast<SlotHeader*>(slot);
    header.epoch = key.epoch;
    header.round = key.round;
    header.totalBytes = message.size();
    if (bytes > 0) {
      std::memcpy(slot + sizeof(SlotHeader), message.data() + peer.postedBytes, bytes);
    }
    sharedWord(slot, offsetof(SlotHeader, flag))
        .store(packSignal(static_cast<std::uint32_t>(bytes) + 1, sequence));
    transport_.ring(rank);
    ++peer.sent;
    peer.postedBytes += bytes;
  } while (peer.postedBytes < message.size());
  return true;
}

/// Takes what has come from a rank: its message of `key`, or with `skipOnly` only older ones.
void Mailbox::takeSome(int rank, const Key& key, bool skipOnly) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  std::byte* control = transport_.control(transport_.rank());
  SharedWord& consumed =
      sharedWord(transport_.control(rank), map_.consumed(lane_, transport_.rank()));
  while (!peer.complete) {
    const std::uint64_t sequence = firstSequence_ + peer.taken;
    std::byte* slot = control + map_.slot(lane_, rank, sequence);
    const std::uint64_t flag = sharedWord(slot, offsetof(SlotHeader, flag)).load();
    const bool arrived =
        signalValue(flag) != 0 && signalTag(flag) == static_cast<std::uint32_t>(sequence);
    if (!arrived) return;
    SlotHeader header;
    std::memcpy(&header, slot, sizeof(header));
    header.flag = flag;
    const Key found{header.epoch, header.round};
    if (found > key) {
      throw PeerFailure(cat("rank ", rank, " is in operation ", header.epoch,
                            " already, while this rank is in operation ", key.epoch));
    }
    if (found == key && skipOnly) return;
    if (found == key) takeSlot(rank, header, slot + sizeof(SlotHeader));
    consumed.store(++peer.taken);
    // Only a full mailbox makes its sender wait for this; a message of one slot never fills it.
    if (found < key || header.totalBytes > kSlotPayload) transport_.ring(rank);
  }
}

void Mailbox::takeSlot(int rank, const SlotHeader& header, const std::byte* payload) {
  const auto index = static_cast<std::size_t>(rank);
  Message& message = incoming_[index];
  const std::size_t bytes = signalValue(header.flag) - 1;
  // A slot without bytes, of a message that has some, could be followed by others without end.
  if (bytes > kSlotPayload || header.totalBytes > kLargestMessage ||
      (bytes == 0 && header.totalBytes > 0) || message.size() + bytes > header.totalBytes) {
    throw PeerFailure(cat("rank ", rank, " sent a malformed message"));
  }
  message.insert(message.end(), payload, payload + bytes);
  peers_[index].complete = message.size() == header.totalBytes;
}

/// Half a message of a rank that was masked meanwhile is none.
void Mailbox::forgetMasked() {
  for (int r = 0; r < transport_.size(); ++r) {
    if (transport_.masked(r)) incoming_[static_cast<std::size_t>(r)].clear();
  }
}

Awaited Mailbox::unfinished(const char* what, bool answers) const {
  Awaited late{{}, what};
  for (std::size_t r = 0; r < peers_.size(); ++r) {
    if (transport_.masked(static_cast<int>(r))) continue;
    const bool done = peers_[r].posted && (peers_[r].complete || !answers);
    if (!done) late.ranks.push_back(static_cast<int>(r));
  }
  return late;
}

}  // namespace mscclpp_ep
