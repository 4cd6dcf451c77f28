// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TRANSPORT_SHARED_MEMORY_HPP_
#define MSCCLPP_EP_TRANSPORT_SHARED_MEMORY_HPP_

#include <sys/types.h>

#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/memory_map.hpp"
#include "transport/connect.hpp"
#include "transport/segment.hpp"
#include "transport/transport.hpp"

namespace mscclpp_ep {

struct SharedMemoryOptions {
  ConnectOptions connect;
  bool shrink = false;  ///< mask a rank that fails or is too slow, instead of failing with it
  /// What share() takes memory from.
  std::shared_ptr<const SegmentSource> segments = hostSegments();
};

/// The ranks of one host, as processes or as threads.
class SharedMemory final : public Transport {
 public:
  SharedMemory(Bootstrap& bootstrap, SharedMemoryOptions options);

  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(peers_.size()); }
  int ranksOnHost() const override { return size(); }
  std::byte* control(int peer) const override { return at(peer).control->data(); }
  std::shared_ptr<const void> controlOwner(int peer) const override { return at(peer).control; }
  void ring(int peer) override { doorbell(peer).ring(); }
  std::int64_t shareableBytes() const override { return segments_->available(); }
  SharedBlock share(std::size_t bytes) override;
  void unshare(std::uint32_t id) override;
  void keepUnshared(bool keep) override { keepsUnshared_ = keep; }
  std::byte* peerMemory(int peer, std::uint32_t id, std::uint64_t offset,
                        std::size_t bytes) override;
  void beginOperation(const char* name, std::uint64_t epoch) override;
  void enterCall(std::uint32_t mode) override;
  bool masked(int peer) const override { return at(peer).masked; }
  void setMask(int peer, bool masked) override;
  void maskFailed() override;
  bool mayStillWrite(int peer) const override;
  void requireNobodyGaveUp() override;
  void giveUp() noexcept override;
  void leave() override;

 protected:
  void waitAsleep(const std::function<bool()>& ready,
                  const std::function<Awaited()>& missing) override;

 private:
  struct Peer {
    PeerLink link;
    std::shared_ptr<Segment> control;
    std::map<std::uint32_t, std::shared_ptr<Segment>> segments;
    bool gone = false;        ///< its process has ended
    bool masked = false;      ///< this rank goes on without it
    bool missed = false;      ///< it was not told of some memory while it was masked
    std::uint64_t turns = 0;  ///< how often it was masked and taken in again: odd while masked
  };

  const Peer& at(int peer) const { return peers_[static_cast<std::size_t>(peer)]; }
  Peer& at(int peer) { return peers_[static_cast<std::size_t>(peer)]; }
  bool isThread(int peer) const { return at(peer).link.localRank != 0; }
  Doorbell doorbell(int peer) const;
  SharedWord& word(int peer, std::size_t offset) const { return sharedWord(control(peer), offset); }

  void announce(std::uint32_t id, std::size_t bytes, int fd);
  std::shared_ptr<Segment> findSegment(int peer, std::uint32_t id);
  std::shared_ptr<Segment> findControl(int peer);
  std::shared_ptr<Segment> mapAnnounced(int peer, std::uint32_t id, FileDescriptor fd,
                                        std::uint64_t bytes);
  std::shared_ptr<Segment> findThreadsSegment(int peer, std::uint32_t id);
  void forgetThreadsSegments();
  std::shared_ptr<Segment> createControl(ConnectOptions& options, std::exception_ptr& failure);
  void takeMessages(int peer);
  void lookAtPeers();
  bool closed(int peer) const;
  bool departed(int peer) const { return at(peer).gone || closed(peer); }
  bool maskedBy(int peer) const;
  void throwIfGaveUp(int peer, const Awaited& missing) const;
  void throwIfMaskedBy(int peer, const Awaited& missing) const;
  void throwIfElsewhere(int peer) const;
  void throwIfPeerFailed(const Awaited& missing) const;
  bool maskFailed(const Awaited& missing, bool late);
  void handleFailures(const Awaited& missing);
  void handleTimeout(const Awaited& missing);
  std::string describe() const;

  /// Tells the peers, at the end of this object, also if its constructor fails half-way.
  struct Farewell {
    SharedMemory& self;
    ~Farewell();
  };

  const int rank_;
  const ControlMap map_;
  const std::uint64_t localRank_;
  const std::chrono::duration<double> timeout_;
  const std::function<void()> pollInterrupt_;
  const bool shrink_;
  const std::shared_ptr<const SegmentSource> segments_;
  const pid_t process_;
  std::vector<Peer> peers_;
  std::vector<std::shared_ptr<Segment>> retired_;  ///< unshared in this operation
  std::uint32_t nextSegment_ = 1;
  bool keepsUnshared_ = false;
  bool newThreadSegments_ = false;  ///< some that a thread shared before may be obsolete
  const char* operation_ = "connecting";
  std::uint64_t epoch_ = 0;
  std::uint64_t call_ = 0;  ///< what this rank has in its word of that name
  bool connecting_ = true;
  bool leaving_ = false;  ///< peers may be gone by now, and nothing is wrong with that
  Farewell farewell_{*this};
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_SHARED_MEMORY_HPP_
