// SPDX-License-Identifier: MIT
// Slots that a peer wrote.
#include "support/fake_peer.hpp"
#include "transport/mailbox.hpp"

namespace mscclpp_ep::fuzz {
namespace {

constexpr Lane kLane = Lane::lowLatency0;
constexpr std::uint64_t kEpoch = 5;

/// A slot with any header, or one that is nearly right.
void fillSlot(FakePeer& peer, Input& input, std::uint64_t sequence) {
  const std::uint32_t value =
      input.flag() ? input.take<std::uint32_t>() : static_cast<std::uint32_t>(input.upTo(80));
  SlotHeader header{
      packSignal(value, sequence), kEpoch, static_cast<std::uint64_t>(value) - 1, 1, {}};
  Bytes bytes = bytesOf(header);
  input.damage(bytes);
  bytes.resize(sizeof(header));
  std::byte* slot = peer.control(0) + peer.map().slot(kLane, 1, sequence);
  std::memcpy(slot, bytes.data(), bytes.size());
}

void exchange(Input& input) {
  FakePeer peer;
  const auto first = input.number();
  Mailbox mailbox(peer, kLane, first);
  for (std::uint64_t i = 0; i < 12 && input.left() > 0; ++i) {
    peer.then([&, i] { fillSlot(peer, input, first + i); });
  }
  // How much the peer says it has taken.
  peer.word(0, peer.map().consumed(kLane, 1)).store(input.number());
  const std::vector<Message> outgoing(
      2, Message(static_cast<std::size_t>(input.upTo(1)) * 3 * kSlotPayload));
  if (input.flag()) mailbox.post(kEpoch, 0, outgoing, "room");
  const auto& incoming = mailbox.exchange(kEpoch, 1, outgoing, "a message");
  must(incoming.size() == 2 && incoming[0] == outgoing[0], "the own message comes back");
  must(incoming[1].size() <= 12 * kSlotPayload, "a message is no longer than what was sent");
}

}  // namespace
}  // namespace mscclpp_ep::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep::fuzz;
  Input input(data, size);
  endsTyped([&] { exchange(input); });
  return 0;
}
