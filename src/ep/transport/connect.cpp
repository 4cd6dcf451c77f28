// SPDX-License-Identifier: MIT
#include "transport/connect.hpp"

#include <poll.h>
#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "core/check.hpp"
#include "transport/unix_socket.hpp"

namespace mscclpp_ep {

namespace {

using Token = std::array<std::byte, 16>;
using Clock = std::chrono::steady_clock;

constexpr int kPollMilliseconds = 50;
constexpr std::size_t kMostSilentCallers = 16;

Token randomToken() {
  Token token;
  EP_SYS_TRY(::getrandom(token.data(), token.size(), 0), "cannot draw random bytes");
  return token;
}

/// Tells apart processes, also one from the child that it forked.
Token processToken() {
  static const Token drawn = randomToken();
  Token token = drawn;
  const auto pid = static_cast<std::uint64_t>(::getpid());
  std::memcpy(token.data(), &pid, sizeof(pid));
  return token;
}

/// What each rank gathers from all; two texts follow.
struct Card {
  std::array<char, 8> magic{'m', 's', 'c', 'c', 'l', 'e', 'p', '1'};
  Token process{};
  Token secret{};  ///< known to the ranks of this group only: they tell it when they connect
  std::uint64_t localRank = 0;
  std::uint32_t refusalBytes = 0;
  std::uint32_t fingerprintBytes = 0;
};

struct Peer {
  Card card;
  std::string refusal;
  std::string fingerprint;
};

/// The first message on a socket.
struct Greeting {
  Token secret{};
  std::int32_t rank = -1;
};

std::string socketName(const Token& secret) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string name = "mscclpp_ep.";
  // The address is public, so it shows the first half of the secret only.
  for (std::size_t i = 0; i < secret.size() / 2; ++i) {
    const auto byte = std::to_integer<unsigned>(secret[i]);
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return name;
}

std::vector<std::byte> encode(const Card& card, const ConnectOptions& options) {
  const std::string texts = options.refusal + options.fingerprint;
  std::vector<std::byte> bytes(sizeof(card) + texts.size());
  std::memcpy(bytes.data(), &card, sizeof(card));
  std::memcpy(bytes.data() + sizeof(card), texts.data(), texts.size());
  return bytes;
}

Peer decode(const Bootstrap::Bytes& bytes, std::size_t rank) {
  Peer peer;
  const bool whole = bytes.size() >= sizeof(Card);
  if (whole) std::memcpy(&peer.card, bytes.data(), sizeof(Card));
  const std::uint64_t texts = std::uint64_t{peer.card.refusalBytes} + peer.card.fingerprintBytes;
  if (!whole || peer.card.magic != Card{}.magic || bytes.size() - sizeof(Card) != texts) {
    throw PeerFailure(cat("rank ", rank,
                          " does not speak this version's language; use the same "
                          "version of mscclpp_ep on every rank"));
  }
  const char* text = reinterpret_cast<const char*>(bytes.data() + sizeof(Card));
  peer.refusal.assign(text, peer.card.refusalBytes);
  peer.fingerprint.assign(text + peer.card.refusalBytes, peer.card.fingerprintBytes);
  return peer;
}

void checkAdmissions(const std::vector<Peer>& peers) {
  for (std::size_t rank = 0; rank < peers.size(); ++rank) {
    if (peers[rank].refusal.empty()) continue;
    throw PeerFailure(cat("rank ", rank, " refused its arguments: ", peers[rank].refusal));
  }
  for (std::size_t rank = 1; rank < peers.size(); ++rank) {
    EP_EXPECTS(peers[rank].fingerprint == peers[0].fingerprint,
               "the ranks made their buffers with different options: rank 0 with ",
               peers[0].fingerprint, "; rank ", rank, " with ", peers[rank].fingerprint);
  }
}

/// One rank's view while it connects.
class Connector {
 public:
  Connector(int rank, const std::vector<Peer>& peers, int listener, const ConnectOptions& options)
      : rank_(static_cast<std::size_t>(rank)),
        peers_(peers),
        listener_(listener),
        deadline_(Clock::now() + std::chrono::duration_cast<Clock::duration>(options.timeout)),
        pollInterrupt_(options.pollInterrupt),
        links_(peers.size()) {}

  std::vector<PeerLink> run() {
    for (std::size_t peer = 0; peer < peers_.size(); ++peer) {
      if (peer == rank_) continue;
      if (sameProcess(peer)) {
        links_[peer].localRank = peers_[peer].card.localRank;
      } else if (peer < rank_) {
        connectTo(peer);
      } else {
        ++expected_;
      }
    }
    while (expected_ > 0) acceptSome();
    return std::move(links_);
  }

 private:
  bool sameProcess(std::size_t peer) const {
    return peers_[peer].card.process == peers_[rank_].card.process;
  }

  void connectTo(std::size_t peer) {
    FileDescriptor socket;
    try {
      while (!(socket = connectAbstract(socketName(peers_[peer].card.secret)))) {
        pause({}, cat("rank ", peer, " to accept a connection"));
      }
    } catch (const SystemError& error) {
      throw NotBuilt(cat("rank ", rank_, " cannot share memory with rank ", peer, " (",
                         error.what(),
                         "). This version serves ranks of one host and one network "
                         "namespace"));
    }
    Greeting greeting{peers_[peer].card.secret, static_cast<std::int32_t>(rank_)};
    sendMessage(socket.get(), std::as_bytes(std::span(&greeting, 1)), -1);
    adopt(peer, std::move(socket));
  }

  void adopt(std::size_t peer, FileDescriptor socket) {
    const PeerCredentials credentials = peerCredentials(socket.get());
    if (credentials.uid != ::geteuid()) {
      throw SystemError(cat("rank ", peer, " belongs to user ", credentials.uid, " and rank ",
                            rank_, " to user ", ::geteuid(), "; run all ranks as one user"));
    }
    links_[peer].process = openProcess(credentials.pid);
    links_[peer].socket = std::move(socket);
  }

  /// Strangers may connect as well, and say nothing or nonsense: they are dropped.
  void acceptSome() {
    std::vector<pollfd> entries{{listener_, POLLIN, 0}};
    for (const FileDescriptor& caller : callers_) entries.push_back({caller.get(), POLLIN, 0});
    pause(entries, cat("ranks ", missing(), " to connect"));
    while (FileDescriptor caller = acceptPending(listener_)) {
      if (peerCredentials(caller.get()).uid != ::geteuid()) continue;
      callers_.push_back(std::move(caller));
    }
    std::erase_if(callers_, [this](FileDescriptor& caller) { return hear(caller); });
    // Those that have been silent longest go first; a rank's greeting comes with its connection.
    const std::size_t most = peers_.size() + kMostSilentCallers;
    if (callers_.size() > most) {
      callers_.erase(callers_.begin(),
                     callers_.begin() + static_cast<std::ptrdiff_t>(callers_.size() - most));
    }
  }

  /// Waits for one of the descriptors, for a moment.
  void pause(std::vector<pollfd> entries, const std::string& awaited) const {
    if (Clock::now() >= deadline_) {
      throw Timeout(cat("rank ", rank_, " waited for ", awaited, "; are all ranks still running?"));
    }
    if (pollInterrupt_) pollInterrupt_();
    ::poll(entries.data(), entries.size(), entries.empty() ? 1 : kPollMilliseconds);
  }

  /// Takes the greeting of a caller, if it has come. True if the caller is done with.
  bool hear(FileDescriptor& caller) {
    Greeting greeting;
    ReceivedMessage received;
    switch (
        receiveMessage(caller.get(), std::as_writable_bytes(std::span(&greeting, 1)), received)) {
      case Arrival::nothing:
        return false;
      case Arrival::closed:
        return true;
      case Arrival::message:
        break;
    }
    const auto peer = static_cast<std::size_t>(greeting.rank);
    const bool known = received.bytes == sizeof(greeting) && peer > rank_ && peer < peers_.size() &&
                       greeting.secret == peers_[rank_].card.secret && !links_[peer].socket &&
                       !sameProcess(peer);
    if (!known) return true;
    adopt(peer, std::move(caller));
    --expected_;
    return true;
  }

  std::string missing() const {
    std::vector<std::size_t> ranks;
    for (std::size_t peer = rank_ + 1; peer < peers_.size(); ++peer) {
      if (!sameProcess(peer) && !links_[peer].socket) ranks.push_back(peer);
    }
    return cat(ranks);
  }

  std::size_t rank_;
  const std::vector<Peer>& peers_;
  int listener_;
  Clock::time_point deadline_;
  const std::function<void()>& pollInterrupt_;
  std::vector<PeerLink> links_;
  std::vector<FileDescriptor> callers_;
  int expected_ = 0;
};

/// Every rank learns whether all have connected; if not, all throw.
void agree(Bootstrap& bootstrap, const std::optional<std::string>& failure) {
  const std::string text = failure.value_or("");
  const auto all = bootstrap.allGather(std::as_bytes(std::span(text.data(), text.size())));
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank].empty()) continue;
    throw NotBuilt(
        cat("the ranks could not be connected; rank ", rank, " says: ",
            std::string_view(reinterpret_cast<const char*>(all[rank].data()), all[rank].size())));
  }
}

}  // namespace

std::vector<PeerLink> connectPeers(Bootstrap& bootstrap, const ConnectOptions& options) {
  Card card;
  card.process = processToken();
  card.secret = randomToken();
  card.localRank = options.localRank;
  card.refusalBytes = static_cast<std::uint32_t>(options.refusal.size());
  card.fingerprintBytes = static_cast<std::uint32_t>(options.fingerprint.size());
  const FileDescriptor listener = listenAbstract(socketName(card.secret));

  std::vector<Peer> peers;
  for (const auto& bytes : bootstrap.allGather(encode(card, options))) {
    peers.push_back(decode(bytes, peers.size()));
  }
  checkAdmissions(peers);

  std::vector<PeerLink> links;
  std::optional<std::string> failure;
  std::exception_ptr own;
  try {
    links = Connector(bootstrap.rank(), peers, listener.get(), options).run();
  } catch (const Error& error) {
    failure = error.what();
    own = std::current_exception();
  }
  try {
    agree(bootstrap, failure);
  } catch (const NotBuilt&) {
    if (own != nullptr) std::rethrow_exception(own);
    throw;
  }
  return links;
}

}  // namespace mscclpp_ep
