// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "support/ranks.hpp"
#include "transport/shared_memory.hpp"
#include "transport/unix_socket.hpp"

namespace mscclpp_ep {
namespace {

using testing::contains;
using testing::errorOf;
using testing::kLaunchers;
using testing::Launcher;
using testing::require;
using testing::runAsThreads;
using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

SharedMemoryOptions withTimeout(Seconds timeout) {
  SharedMemoryOptions options;
  options.connect.timeout = timeout;
  return options;
}

auto somethingOf(std::vector<int> ranks) {
  return [ranks = std::move(ranks)] { return Awaited{ranks, "something"}; };
}

TEST_CASE("ranks write into each other's control segments") {
  for (const Launcher& launcher : kLaunchers) {
    for (const int ranks : {1, 2, 4}) {
      CAPTURE(launcher.name);
      CAPTURE(ranks);
      CHECK_NOTHROW(launcher.run(ranks, [](Bootstrap& bootstrap) {
        SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
        const ControlMap map(memory.size());
        const int self = memory.rank();
        for (int peer = 0; peer < memory.size(); ++peer) {
          sharedWord(memory.control(peer), map.progress(Lane::lowLatency1, kRowsRead, self))
              .store(static_cast<std::uint64_t>(100 * self + peer + 1));
          memory.ring(peer);
        }
        for (int peer = 0; peer < memory.size(); ++peer) {
          const auto expected = static_cast<std::uint64_t>(100 * peer + self + 1);
          const SharedWord& word =
              sharedWord(memory.control(self), map.progress(Lane::lowLatency1, kRowsRead, peer));
          memory.wait([&] { return word.load() == expected; }, somethingOf({peer}));
        }
        memory.leave();
      }));
    }
  }
}

constexpr std::uint32_t kSegments = 3;

std::size_t segmentBytes(int rank, std::uint32_t id) {
  return static_cast<std::size_t>(rank + 1) * id * kPage;
}

std::byte pattern(int rank, std::uint32_t id) {
  return static_cast<std::byte>(10 * rank + static_cast<int>(id));
}

TEST_CASE("segments are announced, and mapped in whatever order they are asked for") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
      for (std::uint32_t id = 1; id <= kSegments; ++id) {
        const SharedBlock block = memory.share(segmentBytes(memory.rank(), id));
        testing::requireEqual(block.id, id, "the id of a segment");
        std::fill_n(block.data, block.bytes, pattern(memory.rank(), id));
      }
      bootstrap.barrier();
      for (int peer = 0; peer < memory.size(); ++peer) {
        for (std::uint32_t id = kSegments; peer != memory.rank() && id > 0; --id) {
          const std::size_t bytes = segmentBytes(peer, id);
          const std::byte* data = memory.peerMemory(peer, id, 0, bytes);
          require(std::count(data, data + bytes, pattern(peer, id)) ==
                      static_cast<std::ptrdiff_t>(bytes),
                  "segment ", id, " of rank ", peer);
        }
      }
      memory.leave();
    }));
  }
}

TEST_CASE("addresses outside a segment are a failure of the peer") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
      const SharedBlock block = memory.share(2 * kPage);
      bootstrap.barrier();
      const int peer = 1 - memory.rank();
      const auto message = [&](std::uint64_t offset, std::size_t bytes) {
        return errorOf<PeerFailure>([&] { memory.peerMemory(peer, block.id, offset, bytes); },
                                    "peerMemory");
      };
      require(contains(message(0, 2 * kPage + 1), "of a segment of 8192"), "the size is named");
      require(contains(message(2 * kPage + 1, 0), "rank " + std::to_string(peer)), "who is named");
      message(kPage, kPage + 1);
      message(~std::uint64_t{0}, 1);
      message(~std::uint64_t{0}, 2);
      message(8, ~std::size_t{0} - 3);
      const std::byte* end = memory.peerMemory(peer, block.id, 2 * kPage, 0);
      require(end - memory.peerMemory(peer, block.id, 0, 1) == 2 * kPage, "the end of a segment");
      memory.leave();
    }));
  }
}

TEST_CASE("memory that was unshared is forgotten, and what was mapped stays usable") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
      const int peer = 1 - memory.rank();
      SharedBlock first = memory.share(kPage);
      first.data[0] = pattern(memory.rank(), 1);
      bootstrap.barrier();
      require(*memory.peerMemory(peer, 1, 0, 1) == pattern(peer, 1), "the first segment");
      bootstrap.barrier();
      memory.unshare(first.id);
      require(first.data[0] == pattern(memory.rank(), 1), "its owner holds it still");
      first = memory.share(3 * kPage);
      first.data[0] = pattern(memory.rank(), 2);
      bootstrap.barrier();
      require(*memory.peerMemory(peer, 2, 0, 3 * kPage) == pattern(peer, 2), "the second segment");
      memory.leave();
    }));
  }
}

TEST_CASE("a segment that nobody shares is not waited for without end") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(Seconds(0.2)));
      if (memory.rank() == 0) {
        const std::string text =
            errorOf<Error>([&] { memory.peerMemory(1, 5, 0, 1); }, "peerMemory");
        require(contains(text, "rank 1"), text);
      }
      bootstrap.barrier();
    }));
  }
}

TEST_CASE("a wait that is too long says who waits for what") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(Seconds(0.2)));
      if (memory.rank() == 1) {
        memory.beginOperation("combine", 77);
        const auto start = Clock::now();
        const std::string text =
            errorOf<Timeout>([&] { memory.wait([] { return false; }, somethingOf({0})); }, "wait");
        require(Clock::now() - start >= std::chrono::milliseconds(190), "it was not too early");
        for (const char* part : {"combine (epoch 77) on rank 1", "0.2 s", "something of rank 0"}) {
          require(contains(text, part), text);
        }
      }
      bootstrap.barrier();
    }));
  }
}

TEST_CASE("a wait calls pollInterrupt, and lets pass what it throws") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    SharedMemoryOptions options = withTimeout(testing::kLongTimeout);
    options.connect.pollInterrupt = [] { throw std::system_error(EINTR, std::generic_category()); };
    SharedMemory memory(bootstrap, options);
    errorOf<std::system_error>([&] { memory.wait([] { return false; }, somethingOf({0})); },
                               "wait");
    bootstrap.barrier();
  }));
}

TEST_CASE("a rank that gives up or goes is noticed by those who wait") {
  for (const Launcher& launcher : kLaunchers) {
    for (const bool givesUp : {true, false}) {
      CAPTURE(launcher.name);
      CAPTURE(givesUp);
      CHECK_NOTHROW(launcher.run(3, [&](Bootstrap& bootstrap) {
        auto memory = std::make_unique<SharedMemory>(bootstrap, withTimeout(testing::kLongTimeout));
        bootstrap.barrier();
        if (memory->rank() == 2) {
          memory->beginOperation("dispatch", 9);
          if (givesUp) memory->giveUp();
          if (!givesUp) memory.reset();
        } else {
          const std::string text = errorOf<PeerFailure>(
              [&] { memory->wait([] { return false; }, somethingOf({0, 1, 2})); }, "wait");
          require(contains(text, givesUp ? "rank 2 gave up in operation 9"
                                         : "rank 2 destroyed its buffer"),
                  text);
          require(contains(text, "waited for something of ranks 0, 1, 2"), text);
        }
        bootstrap.barrier();
      }));
    }
  }
}

TEST_CASE("a rank that fails is masked also where nobody waits, if ranks are masked") {
  for (const Launcher& launcher : kLaunchers) {
    for (const bool shrink : {true, false}) {
      CAPTURE(launcher.name);
      CAPTURE(shrink);
      CHECK_NOTHROW(launcher.run(3, [&](Bootstrap& bootstrap) {
        SharedMemoryOptions options = withTimeout(testing::kLongTimeout);
        options.shrink = shrink;
        auto memory = std::make_unique<SharedMemory>(bootstrap, options);
        bootstrap.barrier();
        if (memory->rank() == 2) memory.reset();
        bootstrap.barrier();
        if (memory != nullptr) {
          memory->maskFailed();
          require(memory->masked(2) == shrink, "the rank that went");
          require(!memory->masked(0) && !memory->masked(1), "those that did not");
        }
        bootstrap.barrier();  // both have looked
      }));
    }
  }
}

TEST_CASE("what a rank did before it went counts") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(2, [](Bootstrap& bootstrap) {
      auto memory = std::make_unique<SharedMemory>(bootstrap, withTimeout(testing::kLongTimeout));
      const ControlMap map(2);
      bootstrap.barrier();  // both are connected
      if (memory->rank() == 1) {
        sharedWord(memory->control(0), map.mask(1)).store(5);
        memory.reset();
        bootstrap.barrier();
        return;
      }
      bootstrap.barrier();
      const SharedWord& word = sharedWord(memory->control(0), map.mask(1));
      memory->wait([&] { return word.load() == 5; }, somethingOf({1}));
    }));
  }
}

TEST_CASE("what a rank did counts also if it gives up while it is being looked at") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
    if (memory.rank() == 0) {
      bool done = false;
      // Called after the look at what is waited for, and before that at who has failed.
      const auto doAndGiveUp = [&] {
        done = true;
        sharedWord(memory.control(0), ControlMap(2).abortWord(1)).store(3);
        return Awaited{{1}, "something"};
      };
      memory.wait([&] { return done; }, doAndGiveUp);
    }
    bootstrap.barrier();
  }));
}

TEST_CASE("a rank that nobody waits for may go") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      auto memory = std::make_unique<SharedMemory>(bootstrap, withTimeout(testing::kLongTimeout));
      const ControlMap map(3);
      bootstrap.barrier();
      if (memory->rank() == 2) memory.reset();
      bootstrap.barrier();
      if (memory == nullptr) return;
      const int peer = 1 - memory->rank();
      // The wait is long enough for a look at the peers.
      if (memory->rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(30));
      sharedWord(memory->control(peer), map.progress(Lane::lowLatency1, kRowsRead, memory->rank()))
          .store(5);
      const SharedWord& word = sharedWord(memory->control(memory->rank()),
                                          map.progress(Lane::lowLatency1, kRowsRead, peer));
      memory->wait([&] { return word.load() == 5; }, somethingOf({peer}));
    }));
  }
}

TEST_CASE("ranks leave together, however late one of them is") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
      if (memory.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(30));
      memory.leave();
    }));
  }
}

TEST_CASE("a rank that has left does not end the leaving of others") {
  // Rank 2 has said goodbye to rank 0, which therefore goes, but not yet to rank 1.
  CHECK_NOTHROW(runAsThreads(3, [](Bootstrap& bootstrap) {
    auto memory = std::make_unique<SharedMemory>(bootstrap, withTimeout(testing::kLongTimeout));
    const ControlMap map(3);
    bootstrap.barrier();
    if (memory->rank() == 2) {
      sharedWord(memory->control(0), map.goodbye(2)).store(1);
      memory->ring(0);
      // Not by a wait of the transport, which rank 0's end would rightly end.
      while (sharedWord(memory->control(0), ControlMap::closed()).load() == 0 ||
             sharedWord(memory->control(2), map.goodbye(1)).load() == 0) {
        std::this_thread::yield();
      }
      // Time for rank 1 to draw the wrong conclusion.
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    memory->leave();
    memory.reset();
  }));
}

TEST_CASE("ranks leave one that gave up as well, and wait for it") {
  for (const Launcher& launcher : kLaunchers) {
    CAPTURE(launcher.name);
    CHECK_NOTHROW(launcher.run(3, [](Bootstrap& bootstrap) {
      SharedMemory memory(bootstrap, withTimeout(testing::kLongTimeout));
      if (memory.rank() == 0) memory.giveUp();
      bootstrap.barrier();
      if (memory.rank() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(30));
      memory.leave();
    }));
  }
}

TEST_CASE("without an answer a rank does not leave for ever") {
  CHECK_NOTHROW(runAsThreads(2, [](Bootstrap& bootstrap) {
    SharedMemory memory(bootstrap, withTimeout(Seconds(0.2)));
    if (memory.rank() == 0) {
      const std::string text = errorOf<Timeout>([&] { memory.leave(); }, "leave");
      require(contains(text, "the call of destroy of rank 1"), text);
    }
    bootstrap.barrier();
  }));
}

#if MSCCLPP_EP_TEST_PROCESSES

TEST_CASE("a process that is killed is noticed long before the timeout") {
  const testing::TemporaryFolder folder;
  const auto ends = testing::endsOfProcesses(2, [&](int rank) {
    const auto bootstrap = makeFileBootstrap(folder.path() + "/group", rank, 2);
    SharedMemory memory(*bootstrap, withTimeout(testing::kLongTimeout));
    bootstrap->barrier();
    if (rank == 1) ::raise(SIGKILL);
    const auto start = Clock::now();
    const std::string text =
        errorOf<PeerFailure>([&] { memory.wait([] { return false; }, somethingOf({1})); }, "wait");
    require(contains(text, "rank 1 died"), text);
    require(Clock::now() - start < std::chrono::seconds(10), "it took too long");
  });
  CHECK(ends == std::vector<std::string>{"", " signal 9"});
}

TEST_CASE("the longest timeout is as good as none") {
  CHECK_NOTHROW(testing::runAsProcesses(2, [](Bootstrap& bootstrap) {
    SharedMemory memory(bootstrap, withTimeout(Seconds(1e9)));
    memory.leave();
  }));
}

/// The abstract addresses at which this process listens, as the kernel lists them.
std::vector<std::string> ownAddresses() {
  std::vector<std::string> inodes;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code ignored;
    const std::string target = std::filesystem::read_symlink(entry.path(), ignored).string();
    if (target.starts_with("socket:[")) inodes.push_back(target.substr(8, target.size() - 9));
  }
  std::vector<std::string> addresses;
  std::ifstream table("/proc/net/unix");
  for (std::string line; std::getline(table, line);) {
    std::istringstream words(line);
    std::string skipped, inode, address;
    words >> skipped >> skipped >> skipped >> skipped >> skipped >> skipped >> inode >> address;
    const bool own = std::ranges::find(inodes, inode) != inodes.end();
    if (own && address.starts_with("@mscclpp_ep.")) addresses.push_back(address.substr(1));
  }
  return addresses;
}

/// Meets the ranks as another bootstrap does, but first lets strangers at the rank's socket.
class BesiegedBootstrap final : public Bootstrap {
 public:
  explicit BesiegedBootstrap(Bootstrap& real) : real_(real) {}
  int rank() const override { return real_.rank(); }
  int size() const override { return real_.size(); }
  std::vector<Bytes> allGather(std::span<const std::byte> mine) override {
    if (strangers_.empty()) besiege();
    return real_.allGather(mine);
  }
  std::size_t numStrangers() const { return strangers_.size(); }

 private:
  void besiege() {
    for (const std::string& address : ownAddresses()) {
      strangers_.push_back(connectAbstract(address));  // says nothing
      talk(address, 20);                               // as many bytes as a greeting has
      talk(address, rank() % 2 == 0 ? 0 : 1);
      if (rank() % 2 == 0) talk(address, 1000);
      if (rank() % 2 != 0) connectAbstract(address);  // and is gone
    }
  }
  void talk(const std::string& address, std::size_t bytes) {
    strangers_.push_back(connectAbstract(address));
    sendMessage(strangers_.back().get(), std::vector<std::byte>(bytes, std::byte{1}), -1);
  }

  Bootstrap& real_;
  std::vector<FileDescriptor> strangers_;
};

TEST_CASE("strangers at the socket, silent or talking, do not keep ranks from connecting") {
  CHECK_NOTHROW(testing::runAsProcesses(4, [](Bootstrap& bootstrap) {
    BesiegedBootstrap besieged(bootstrap);
    SharedMemory memory(besieged, withTimeout(testing::kLongTimeout));
    require(besieged.numStrangers() >= 3, "the strangers came");
    const SharedBlock block = memory.share(kPage);
    bootstrap.barrier();
    const int peer = (memory.rank() + 1) % 4;
    require(memory.peerMemory(peer, block.id, 0, kPage) != nullptr, "memory of a peer");
    memory.leave();
  }));
}

#endif  // MSCCLPP_EP_TEST_PROCESSES

}  // namespace
}  // namespace mscclpp_ep
