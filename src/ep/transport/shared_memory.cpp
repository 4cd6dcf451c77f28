// SPDX-License-Identifier: MIT
#include "transport/shared_memory.hpp"

#include <unistd.h>

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

std::string toString(const Awaited& awaited) {
  return cat(awaited.what, " of rank", awaited.ranks.size() == 1 ? " " : "s ", awaited.ranks);
}

SharedMemory::SharedMemory(Bootstrap& bootstrap, SharedMemoryOptions options)
    : rank_(bootstrap.rank()),
      map_(bootstrap.size()),
      localRank_(SegmentRegistry::newRank()),
      timeout_(options.connect.timeout),
      pollInterrupt_(options.connect.pollInterrupt),
      shrink_(options.shrink),
      segments_(options.segments),
      process_(::getpid()),
      peers_(static_cast<std::size_t>(bootstrap.size())) {
  std::exception_ptr failure;
  const std::shared_ptr<Segment> control = createControl(options.connect, failure);
  options.connect.localRank = localRank_;
  std::vector<PeerLink> links;
  try {
    links = connectPeers(bootstrap, options.connect);
  } catch (const Error&) {
    if (failure != nullptr) std::rethrow_exception(failure);
    throw;
  }
  for (int peer = 0; peer < size(); ++peer) {
    at(peer).link = std::move(links[static_cast<std::size_t>(peer)]);
  }
  // With a core for each rank a wake-up by spinning is fastest; without, it keeps the awaited rank
  // from running.
  const bool crowded = ranksOnHost() > coresAvailable();
  spinLimit_ = crowded ? std::chrono::microseconds(2) : std::chrono::microseconds(50);
  announce(kControlSegment, control->bytes(), control->fd());
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank_) at(peer).control = findControl(peer);
  }
  connecting_ = false;
}

/// The own control segment. If there is no memory for it, the peers, who are about to connect, must
/// learn that too.
std::shared_ptr<Segment> SharedMemory::createControl(ConnectOptions& options,
                                                     std::exception_ptr& failure) {
  try {
    auto control = Segment::create(map_.bytes());
    SegmentRegistry::add({localRank_, kControlSegment}, control);
    at(rank_).control = control;
    return control;
  } catch (const Error& error) {
    failure = std::current_exception();
    options.refusal = error.what();
    return nullptr;
  }
}

SharedMemory::Farewell::~Farewell() {
  // A forked child shares the memory, but is not the rank.
  if (::getpid() != self.process_) return;
  const bool connected = self.at(self.rank_).control != nullptr;
  // First: peers keep what one had that has gone.
  if (connected) self.word(self.rank_, ControlMap::closed()).store(1);
  SegmentRegistry::removeRank(self.localRank_);
  if (!connected) return;
  for (int peer = 0; peer < self.size(); ++peer) {
    if (peer == self.rank_ || self.at(peer).control == nullptr) continue;
    self.word(peer, self.map_.goodbye(self.rank_)).store(1);
    self.ring(peer);
  }
}

Doorbell SharedMemory::doorbell(int peer) const {
  std::byte* base = control(peer);
  return {base + ControlMap::doorbell(), base + ControlMap::waiting()};
}

SharedBlock SharedMemory::share(std::size_t bytes) {
  const std::shared_ptr<Segment> segment = segments_->create(bytes);
  const std::uint32_t id = nextSegment_++;
  SegmentRegistry::add({localRank_, id}, segment);
  announce(id, segment->bytes(), segment->fd());
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
      if (sendMessage(at(peer).link.socket.get(), std::as_bytes(std::span(&announcement, 1)), fd)) {
        return true;
      }
      // A masked one is not waited for, but may be taken in again only if it knows all.
      at(peer).missed = at(peer).missed || masked(peer);
      return masked(peer);
    };
    if (sent()) continue;
    wait(sent, [peer] { return Awaited{{peer}, "room for a message"}; });
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
        [peer] { return Awaited{{peer}, "shared memory"}; });
  }
  return segments[id];
}

std::shared_ptr<Segment> SharedMemory::findControl(int peer) {
  auto control = findSegment(peer, kControlSegment);
  if (control->bytes() < map_.bytes()) {
    throw PeerFailure(cat("rank ", peer, " has a control segment of ", control->bytes(),
                          " bytes instead of ", map_.bytes(),
                          "; use the same version of mscclpp_ep on every rank"));
  }
  return control;
}

std::shared_ptr<Segment> SharedMemory::findThreadsSegment(int peer, std::uint32_t id) {
  auto segment = SegmentRegistry::find({at(peer).link.localRank, id});
  if (segment == nullptr) throw PeerFailure(cat("rank ", peer, " has destroyed its buffer"));
  newThreadSegments_ = true;
  return at(peer).segments[id] = segment;
}

/// Segments of a thread are kept, lest its end take away memory that is being written to. What it
/// has unshared is let go of between operations; not so all that it had, when it has gone.
void SharedMemory::forgetThreadsSegments() {
  newThreadSegments_ = false;
  for (int peer = 0; peer < size(); ++peer) {
    if (!isThread(peer)) continue;
    const std::uint64_t owner = at(peer).link.localRank;
    std::erase_if(at(peer).segments, [&](const auto& entry) {
      // In this order: a rank says that it goes before it takes its segments away.
      return SegmentRegistry::find({owner, entry.first}) == nullptr && !departed(peer);
    });
  }
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

/// Access to memory beyond the end of its file would end this process.
std::shared_ptr<Segment> SharedMemory::mapAnnounced(int peer, std::uint32_t id, FileDescriptor fd,
                                                    std::uint64_t bytes) {
  // Signals are exchanged in the memory of the host, wherever rows are.
  const auto& source = id == kControlSegment ? hostSegments() : segments_;
  const std::uint64_t found = source->bytesBehind(fd.get());
  if (bytes > found) {
    throw PeerFailure(cat("rank ", peer, " shared ", bytes, " bytes of memory that has ", found));
  }
  return source->map(std::move(fd), bytes);
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
    if (received.bytes != sizeof(announcement) ||
        static_cast<bool>(received.fd) != (announcement.bytes != 0)) {
      throw PeerFailure(cat("rank ", peer, " sent a malformed message"));
    }
    if (const auto old = from.segments.find(announcement.id); old != from.segments.end()) {
      // A peer that unshares too early must not take away memory that is being used.
      retired_.push_back(std::move(old->second));
      from.segments.erase(old);
    }
    if (announcement.bytes == 0) continue;
    from.segments[announcement.id] =
        mapAnnounced(peer, announcement.id, std::move(received.fd), announcement.bytes);
  }
}

void SharedMemory::lookAtPeers() {
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank_ && !isThread(peer)) takeMessages(peer);
  }
}

bool SharedMemory::closed(int peer) const {
  return at(peer).control != nullptr && word(peer, ControlMap::closed()).load() != 0;
}

/// A process that is being ended loses its socket before all else that is its own.
bool SharedMemory::mayStillWrite(int peer) const {
  const Peer& other = at(peer);
  if (!other.gone) return true;
  return !closed(peer) && other.link.process && !readable(other.link.process.get());
}

std::string SharedMemory::describe() const {
  return cat(operation_, " (epoch ", epoch_, ") on rank ", rank_);
}

void SharedMemory::beginOperation(const char* name, std::uint64_t epoch) {
  operation_ = name;
  epoch_ = epoch;
  if (keepsUnshared_) return;
  retired_.clear();
  if (newThreadSegments_) forgetThreadsSegments();
}

void SharedMemory::enterCall(std::uint32_t mode) {
  call_ = packSignal(mode, signalTag(call_) + 1);
  word(rank_, ControlMap::call()).store(call_);
}

void SharedMemory::throwIfElsewhere(int peer) const {
  if (call_ == 0 || masked(peer)) return;
  const std::uint64_t other = word(peer, ControlMap::call()).load();
  if (signalTag(other) != signalTag(call_) || signalValue(other) == signalValue(call_)) return;
  throw PeerFailure(cat("the ranks disagree on the operation: this rank is in ", describe(),
                        ", and rank ", peer, " has called one of the other mode"));
}

void SharedMemory::throwIfGaveUp(int peer, const Awaited& missing) const {
  const std::uint64_t abort = word(rank_, map_.abortWord(peer)).load();
  if (abort == 0) return;
  throw PeerFailure(cat(describe(), ": rank ", peer, " gave up in operation ", abort >> 1,
                        ", after an error of its own, while this rank waited for ", missing));
}

void SharedMemory::requireNobodyGaveUp() {
  for (int peer = 0; peer < size(); ++peer) {
    if (masked(peer)) continue;
    try {
      const Awaited rows{{peer}, "the rows"};
      throwIfGaveUp(peer, rows);
      throwIfMaskedBy(peer, rows);
    } catch (const PeerFailure&) {
      if (!shrink_) throw;
      // What was read of this peer is worth nothing, but the next operation can do without it.
      setMask(peer, true);
      throw;
    }
  }
}

/// Two ranks that mask each other and take each other in again do so at different times. One that
/// is behind this rank in that will follow; it is one ahead that has masked it anew.
bool SharedMemory::maskedBy(int peer) const {
  const std::uint64_t turns = word(rank_, map_.mask(peer)).load();
  return turns % 2 == 1 && turns > at(peer).turns;
}

void SharedMemory::throwIfMaskedBy(int peer, const Awaited& missing) const {
  if (!maskedBy(peer)) return;
  throw PeerFailure(
      cat(describe(), ": rank ", peer,
          " has masked this rank, and goes on without it, while this rank waited for ", missing));
}

void SharedMemory::setMask(int peer, bool masked) {
  if (!masked) {
    lookAtPeers();
    if (departed(peer) || word(rank_, map_.abortWord(peer)).load() != 0) {
      throw PeerFailure(cat("rank ", peer, " is gone, and cannot be taken in again"));
    }
    if (at(peer).missed) {
      throw PeerFailure(cat("rank ", peer,
                            " took no messages while it was masked, and cannot be taken in again"));
    }
  }
  if (at(peer).masked == masked) return;
  at(peer).masked = masked;
  std::uint64_t& turns = at(peer).turns;
  turns = masked && maskedBy(peer) ? word(rank_, map_.mask(peer)).load() : turns + 1;
  word(peer, map_.mask(rank_)).store(turns);
  ring(peer);
}

/// Masks the ranks that have failed, and with `late` all that are waited for. False if there are
/// none to mask.
bool SharedMemory::maskFailed(const Awaited& missing, bool late) {
  bool any = false;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_ || masked(peer)) continue;
    const bool awaited =
        std::find(missing.ranks.begin(), missing.ranks.end(), peer) != missing.ranks.end();
    const bool gaveUp = word(rank_, map_.abortWord(peer)).load() != 0 || maskedBy(peer);
    if (gaveUp || (awaited && (late || departed(peer)))) {
      setMask(peer, true);
      any = true;
    }
  }
  return any;
}

void SharedMemory::maskFailed() {
  if (!shrink_ || connecting_ || leaving_) return;
  lookAtPeers();
  Awaited all;
  for (int peer = 0; peer < size(); ++peer) all.ranks.push_back(peer);
  maskFailed(all, false);
}

void SharedMemory::handleFailures(const Awaited& missing) {
  if (leaving_) return;
  for (const int peer : missing.ranks) throwIfElsewhere(peer);
  if (!shrink_ || connecting_) return throwIfPeerFailed(missing);
  maskFailed(missing, false);
}

void SharedMemory::handleTimeout(const Awaited& missing) {
  if (shrink_ && !connecting_ && !leaving_ && maskFailed(missing, true)) return;
  throw Timeout(cat(describe(), " waited ", timeout_.count(), " s for ", missing,
                    "; raise `timeout` if that rank is only slow"));
}

void SharedMemory::throwIfPeerFailed(const Awaited& missing) const {
  for (int peer = 0; peer < size(); ++peer) {
    if (masked(peer)) continue;
    throwIfGaveUp(peer, missing);
    throwIfMaskedBy(peer, missing);
  }
  // A rank that is not waited for may have done its part and gone.
  for (const int peer : missing.ranks) {
    if (!departed(peer)) continue;
    // One that left orderly ends its sockets as well.
    const char* how = closed(peer) ? " destroyed its buffer" : " died";
    throw PeerFailure(
        cat(describe(), ": rank ", peer, how, " while this rank waited for ", missing));
  }
}

void SharedMemory::waitAsleep(const std::function<bool()>& ready,
                              const std::function<Awaited()>& missing) {
  auto start = Clock::now();
  const Doorbell bell = doorbell(rank_);
  auto nextInterrupt = start + kInterruptPeriod;
  std::chrono::nanoseconds slice = kFirstSlice;
  while (!bell.sleep(ready, slice)) {
    slice = std::min<std::chrono::nanoseconds>(slice * 2, kLastSlice);
    const auto now = Clock::now();
    lookAtPeers();
    if (ready()) return;
    try {
      handleFailures(missing());
    } catch (const PeerFailure&) {
      // What a peer did before it failed counts: it is looked for once more.
      if (ready()) return;
      throw;
    }
    // Nothing is left to wait for if those that were waited for have just been masked.
    if (ready()) return;
    if (now - start >= timeout_) {
      handleTimeout(missing());
      start = now;
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
      return word(rank_, map_.goodbye(peer)).load() != 0 || departed(peer) || masked(peer);
    };
    if (peer != rank_) {
      wait(through, [peer] { return Awaited{{peer}, "the call of destroy"}; });
    }
  }
}

}  // namespace mscclpp_ep
