// SPDX-License-Identifier: MIT
// Rank 0 of two, in one thread: rank 1 is what the fuzzer makes of it. It acts when rank 0 waits.
#ifndef MSCCLPP_EP_FUZZ_SUPPORT_FAKE_PEER_HPP_
#define MSCCLPP_EP_FUZZ_SUPPORT_FAKE_PEER_HPP_

#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <utility>

#include "core/check.hpp"
#include "core/memory_map.hpp"
#include "support/input.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep::fuzz {

/// Memory with the bounds and the alignment of a mapped segment, so that a sanitizer sees every
/// access beyond it.
inline std::shared_ptr<std::byte> makePages(std::size_t bytes) {
  constexpr std::align_val_t kAlignment{kPage};
  auto* data = static_cast<std::byte*>(::operator new(bytes, kAlignment));
  std::memset(data, 0, bytes);
  return {data, [](std::byte* old) { ::operator delete(old, kAlignment); }};
}

inline constexpr std::uint32_t kPeerSegment = 1;
inline constexpr std::size_t kPeerSegmentBytes = std::size_t{16} * kPage;

class FakePeer final : public Transport {
 public:
  FakePeer()
      : control_{makePages(map_.bytes()), makePages(map_.bytes())},
        memory_(makePages(kPeerSegmentBytes)) {}

  int rank() const override { return 0; }
  int size() const override { return 2; }
  int ranksOnHost() const override { return 2; }
  std::byte* control(int peer) const override {
    return control_[static_cast<std::size_t>(peer)].get();
  }
  std::shared_ptr<const void> controlOwner(int /*peer*/) const override { return nullptr; }
  void ring(int /*peer*/) override {}
  std::int64_t shareableBytes() const override { return std::int64_t{1} << 40; }
  SharedBlock share(std::size_t bytes) override {
    const auto data = makePages(bytes);
    return {nextSegment_++, data.get(), bytes, data};
  }
  void unshare(std::uint32_t /*id*/) override {}
  std::byte* peerMemory(int /*peer*/, std::uint32_t id, std::uint64_t offset,
                        std::size_t bytes) override {
    if (id != kPeerSegment || offset > kPeerSegmentBytes || bytes > kPeerSegmentBytes - offset) {
      throw PeerFailure("no such memory");
    }
    return memory_.get() + offset;
  }
  void beginOperation(const char* /*name*/, std::uint64_t /*epoch*/) override {}
  void enterCall(std::uint32_t /*mode*/) override {}
  bool masked(int /*peer*/) const override { return false; }
  void setMask(int /*peer*/, bool /*masked*/) override {}
  bool mayStillWrite(int /*peer*/) const override { return true; }
  void requireNobodyGaveUp() override {}
  void giveUp() noexcept override {}
  void leave() override {}

  /// What rank 1 does when rank 0 waits the next time, after all that was said before.
  void then(std::function<void()> step) { steps_.push_back(std::move(step)); }
  void forgetSteps() { steps_.clear(); }
  std::byte* memory() const { return memory_.get(); }
  SharedWord& word(int owner, std::size_t offset) const {
    return sharedWord(control(owner), offset);
  }
  const ControlMap& map() const { return map_; }

  /// Fills the slot of rank 1's next message.
  void post(Lane lane, std::uint64_t epoch, std::uint32_t round, const Bytes& message) {
    const std::uint64_t sequence = sequence_[static_cast<std::size_t>(lane)]++;
    const std::size_t bytes = std::min(message.size(), kSlotPayload);
    const SlotHeader header{packSignal(static_cast<std::uint32_t>(bytes) + 1, sequence),
                            epoch,
                            message.size(),
                            round,
                            {}};
    std::byte* slot = control(0) + map_.slot(lane, 1, sequence);
    std::memcpy(slot, &header, sizeof(header));
    if (bytes > 0) std::memcpy(slot + sizeof(header), message.data(), bytes);
  }
  void raise(Lane lane, Progress which, std::uint32_t value, std::uint64_t epoch) const {
    word(0, map_.progress(lane, which, 1)).store(packSignal(value, epoch));
  }

 protected:
  void waitAsleep(const std::function<bool()>& ready,
                  const std::function<Awaited()>& missing) override {
    while (!ready()) {
      if (steps_.empty()) throw Timeout(cat("waited for ", missing()));
      const auto step = std::move(steps_.front());
      steps_.pop_front();
      step();
    }
  }

 private:
  const ControlMap map_{2};
  const std::shared_ptr<std::byte> control_[2];
  const std::shared_ptr<std::byte> memory_;
  std::deque<std::function<void()>> steps_;
  std::uint64_t sequence_[kNumLanes] = {1, 1, 1};
  std::uint32_t nextSegment_ = 1;
};

/// The bytes of a record.
template <typename Record>
Bytes bytesOf(const Record& record) {
  const auto bytes = std::as_bytes(std::span(&record, 1));
  return {bytes.begin(), bytes.end()};
}

}  // namespace mscclpp_ep::fuzz

#endif  // MSCCLPP_EP_FUZZ_SUPPORT_FAKE_PEER_HPP_
