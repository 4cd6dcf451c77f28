// SPDX-License-Identifier: MIT
#include "transport/shared_memory.hpp"

#include <algorithm>

#include "core/check.hpp"
#include "transport/memory_limit.hpp"
#include "transport/unix_socket.hpp"

namespace mscclpp_ep {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint32_t kControlSegment = 0;
// A sleep is cut into slices, to look at the peers' sockets and for signals of the user.
constexpr std::chrono::milliseconds kFirstSlice{1};
constexpr std::chrono::milliseconds kLastSlice{10};
constexpr std::chrono::milliseconds kInterruptPeriod{50};

/// Goes with the descriptor of a new segment; without one, the segment is to be forgotten.
struct Announcement {
  std::uint32_t id = 0;
  std::uint32_t reserved = 0;
  std::uint64_t bytes = 0;
};

}  // namespace

SharedMemory::SharedMemory(Bootstrap& bootstrap, SharedMemoryOptions options)
    : rank_(bootstrap.rank()),
      map_(bootstrap.size()),
      localRank_(SegmentRegistry::newRank()),
      timeout_(options.connect.timeout),
      pollInterrupt_(std::move(options.pollInterrupt)),
      peers_(static_cast<std::size_t>(bootstrap.size())) {
  const auto control = Segment::create(map_.bytes());
  at(rank_).control = control;
  SegmentRegistry::add({localRank_, kControlSegment}, control);
  options.connect.localRank = localRank_;
  std::vector<PeerLink> links = connectPeers(bootstrap, options.connect);
  for (int peer = 0; peer < size(); ++peer) {
    at(peer).link = std::move(links[static_cast<std::size_t>(peer)]);
  }
  // With a core for each rank a wake-up by spinning is fastest; without, it keeps the awaited rank
  // from running.
  const bool crowded = ranksOnHost() > coresAvailable();
  spinLimit_ = crowded ? std::chrono::microseconds(2) : std::chrono::microseconds(50);
  announce(kControlSegment, control->bytes(), control->fd());
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank_) at(peer).control = findSegment(peer, kControlSegment);
  }
}

SharedMemory::~SharedMemory() {
  word(rank_, ControlMap::closed()).store(1);
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_ || at(peer).control == nullptr) continue;
    word(peer, map_.goodbye(rank_)).store(1);
    ring(peer);
  }
  SegmentRegistry::removeRank(localRank_);
}

Doorbell SharedMemory::doorbell(int peer) const {
  std::byte* base = control(peer);
  return {base + ControlMap::doorbell(), base + ControlMap::waiting()};
}

SharedBlock SharedMemory::share(std::size_t bytes) {
  const std::shared_ptr<Segment> segment = Segment::create(bytes);
  const std::uint32_t id = nextSegment_++;
  SegmentRegistry::add({localRank_, id}, segment);
  announce(id, bytes, segment->fd());
  segment->closeFd();
  at(rank_).segments[id] = segment;
  return {id, segment->data(), segment->bytes(), segment};
}

void SharedMemory::unshare(std::uint32_t id) {
  SegmentRegistry::remove({localRank_, id});
  announce(id, 0, -1);
  at(rank_).segments.erase(id);
}

/// Sends the descriptor to every peer that is another process.
void SharedMemory::announce(std::uint32_t id, std::size_t bytes, int fd) {
  const Announcement announcement{id, 0, bytes};
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_ || isThread(peer)) continue;
    const auto sent = [&] {
      return sendMessage(at(peer).link.socket.get(), std::as_bytes(std::span(&announcement, 1)),
                         fd);
    };
    if (sent()) continue;
    wait(sent, [peer] { return cat("rank ", peer, " to take a descriptor of shared memory"); });
  }
}

std::shared_ptr<Segment> SharedMemory::findSegment(int peer, std::uint32_t id) {
  auto& segments = at(peer).segments;
  const auto known = [&] { return segments.find(id) != segments.end(); };
  if (known()) return segments[id];
  if (isThread(peer)) return findThreadsSegment(peer, id);
  takeMessages(peer);
  if (!known()) {
    wait(
        [&] {
          takeMessages(peer);
          return known();
        },
        [peer] { return cat("shared memory of rank ", peer); });
  }
  return segments[id];
}

std::shared_ptr<Segment> SharedMemory::findThreadsSegment(int peer, std::uint32_t id) {
  const std::uint64_t owner = at(peer).link.localRank;
  auto segment = SegmentRegistry::find({owner, id});
  if (segment == nullptr) throw PeerFailure(cat("rank ", peer, " has destroyed its buffer"));
  auto& segments = at(peer).segments;
  // Segments are kept, lest the owner's end take away memory that is being written to; what the
  // owner has unshared is let go of here.
  std::erase_if(segments, [owner](const auto& entry) {
    return SegmentRegistry::find({owner, entry.first}) == nullptr;
  });
  return segments[id] = segment;
}

std::byte* SharedMemory::peerMemory(int peer, std::uint32_t id, std::uint64_t offset,
                                    std::size_t bytes) {
  const std::shared_ptr<Segment> segment = findSegment(peer, id);
  if (offset > segment->bytes() || bytes > segment->bytes() - offset) {
    throw PeerFailure(cat("rank ", peer, " published bytes ", offset, " to ", offset + bytes,
                          " of a segment of ", segment->bytes()));
  }
  return segment->data() + offset;
}

/// Maps the segments that a peer has announced, and notices its end.
void SharedMemory::takeMessages(int peer) {
  Peer& from = at(peer);
  while (!from.gone) {
    Announcement announcement;
    ReceivedMessage received;
    switch (receiveMessage(from.link.socket.get(),
                           std::as_writable_bytes(std::span(&announcement, 1)), received)) {
      case Arrival::nothing:
        from.gone = from.link.process && readable(from.link.process.get());
        return;
      case Arrival::closed:
        from.gone = true;
        return;
      case Arrival::message:
        break;
    }
    if (received.bytes != sizeof(announcement)) {
      throw PeerFailure(cat("rank ", peer, " sent a malformed message"));
    }
    if (received.fd) {
      from.segments[announcement.id] = Segment::map(std::move(received.fd), announcement.bytes);
    } else {
      from.segments.erase(announcement.id);
    }
  }
}

void SharedMemory::lookAtPeers() {
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank_ && !isThread(peer)) takeMessages(peer);
  }
}

bool SharedMemory::departed(int peer) const {
  if (at(peer).gone) return true;
  return at(peer).control != nullptr && word(peer, ControlMap::closed()).load() != 0;
}

std::string SharedMemory::describe() const {
  return cat(operation_, " (epoch ", epoch_, ") on rank ", rank_);
}

void SharedMemory::beginOperation(const char* name, std::uint64_t epoch) {
  operation_ = name;
  epoch_ = epoch;
}

void SharedMemory::throwIfPeerFailed(const std::string& missing) const {
  if (leaving_) return;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    if (word(rank_, map_.abortWord(peer)).load() != 0) {
      throw PeerFailure(cat(describe(), ": rank ", peer, " gave up in operation ",
                            word(rank_, map_.abortWord(peer)).load() >> 1,
                            ", after an error of "
                            "its own, while this rank waited for ",
                            missing));
    }
    if (departed(peer)) {
      throw PeerFailure(cat(describe(), ": rank ", peer,
                            at(peer).gone ? " died" : " destroyed its buffer",
                            " while this rank waited for ", missing));
    }
  }
}

void SharedMemory::waitAsleep(const std::function<bool()>& ready,
                              const std::function<std::string()>& missing) {
  const auto start = Clock::now();
  const Doorbell bell = doorbell(rank_);
  auto nextInterrupt = start + kInterruptPeriod;
  std::chrono::nanoseconds slice = kFirstSlice;
  while (!bell.sleep(ready, slice)) {
    slice = std::min<std::chrono::nanoseconds>(slice * 2, kLastSlice);
    const auto now = Clock::now();
    lookAtPeers();
    // What a peer did before it failed counts: it is looked for once more.
    if (ready()) return;
    throwIfPeerFailed(missing());
    if (now - start >= timeout_) {
      throw Timeout(cat(describe(), " waited ", timeout_.count(), " s for ", missing(),
                        "; raise `timeout` if that rank is only slow"));
    }
    if (pollInterrupt_ && now >= nextInterrupt) {
      pollInterrupt_();
      nextInterrupt = now + kInterruptPeriod;
    }
  }
}

void SharedMemory::giveUp() noexcept {
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_ || at(peer).control == nullptr) continue;
    word(peer, map_.abortWord(rank_)).store(epoch_ << 1 | 1);
    ring(peer);
  }
}

void SharedMemory::leave() {
  beginOperation("destroy", epoch_);
  leaving_ = true;
  for (int peer = 0; peer < size(); ++peer) {
    word(peer, map_.goodbye(rank_)).store(1);
    ring(peer);
  }
  for (int peer = 0; peer < size(); ++peer) {
    const auto through = [&] {
      return word(rank_, map_.goodbye(peer)).load() != 0 || departed(peer);
    };
    if (peer != rank_) {
      wait(through, [peer] { return cat("rank ", peer, " to destroy its buffer"); });
    }
  }
}

}  // namespace mscclpp_ep
