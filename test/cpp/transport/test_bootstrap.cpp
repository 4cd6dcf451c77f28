// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "mscclpp_ep/bootstrap.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep {
namespace {

namespace fs = std::filesystem;
using Bytes = Bootstrap::Bytes;
using Group = std::vector<std::shared_ptr<Bootstrap>>;
using Seconds = std::chrono::duration<double>;

constexpr Seconds kLong{60};
constexpr Seconds kShort{1};

/// What each rank threw: its class and message; empty for nothing.
std::string outcomeOf(const std::function<void()>& work) {
  try {
    work();
  } catch (const Timeout& error) {
    return std::string("Timeout: ") + error.what();
  } catch (const PeerFailure& error) {
    return std::string("PeerFailure: ") + error.what();
  } catch (const InvalidArgument& error) {
    return std::string("InvalidArgument: ") + error.what();
  } catch (const std::exception& error) {
    return std::string("other: ") + error.what();
  }
  return "";
}

/// Runs `work(rank)` in a thread for each of `ranks`.
std::vector<std::string> inThreads(const std::vector<int>& ranks,
                                   const std::function<void(int)>& work) {
  std::vector<std::string> outcomes(ranks.size());
  std::vector<std::thread> threads;
  threads.reserve(ranks.size());
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    threads.emplace_back([&, i] { outcomes[i] = outcomeOf([&] { work(ranks[i]); }); });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

std::vector<int> firstRanks(int size) {
  std::vector<int> ranks(static_cast<std::size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

std::vector<std::string> nothingThrown(std::size_t size) { return std::vector<std::string>(size); }

/// Another number of other bytes for each rank and round, sometimes none.
Bytes message(int rank, int round) {
  Bytes bytes(static_cast<std::size_t>((rank * 7 + round * 13) % 50));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(static_cast<std::size_t>(rank * 31 + round) + i);
  }
  return bytes;
}

void gatherRounds(Bootstrap& bootstrap, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    std::vector<Bytes> expected;
    expected.reserve(static_cast<std::size_t>(bootstrap.size()));
    for (int r = 0; r < bootstrap.size(); ++r) expected.push_back(message(r, round));
    if (bootstrap.allGather(message(bootstrap.rank(), round)) != expected) {
      throw std::logic_error("wrong bytes in round " + std::to_string(round));
    }
  }
}

bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "mscclpp_ep_files_XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }

  std::string prefix() const { return (path_ / "run").string(); }
  bool has(const std::string& name) const { return fs::exists(path_ / name); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(path_ / name) << text;
  }
  std::string read(const std::string& name) const {
    std::ostringstream text;
    text << std::ifstream(path_ / name).rdbuf();
    return text.str();
  }
  std::set<std::string> names() const {
    std::set<std::string> found;
    for (const auto& entry : fs::directory_iterator(path_)) {
      found.insert(entry.path().filename().string());
    }
    return found;
  }

 private:
  fs::path path_;
};

Group makeFileGroup(const Folder& folder, int size, Seconds timeout = kLong) {
  Group group(static_cast<std::size_t>(size));
  const auto outcomes = inThreads(firstRanks(size), [&](int r) {
    group[static_cast<std::size_t>(r)] = makeFileBootstrap(folder.prefix(), r, size, timeout);
  });
  REQUIRE(outcomes == nothingThrown(group.size()));
  return group;
}

/// A process that exits, without destructors, with 0 if `work` throws nothing.
pid_t startProcess(const std::function<void()>& work) {
  const pid_t child = ::fork();
  REQUIRE(child != -1);
  if (child == 0) ::_exit(outcomeOf(work).empty() ? 0 : 1);
  return child;
}

int waitFor(pid_t process) {
  int status = -1;
  REQUIRE(::waitpid(process, &status, 0) == process);
  return status;
}

void killProcess(pid_t process) {
  REQUIRE(::kill(process, SIGKILL) == 0);
  REQUIRE(WIFSIGNALED(waitFor(process)));
}

void waitUntil(const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!done() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  REQUIRE(done());
}

// --- What both kinds do -------------------------------------------------------------------------

void checkGathers(const Group& group) {
  const int size = static_cast<int>(group.size());
  const auto outcomes = inThreads(firstRanks(size), [&](int r) {
    Bootstrap& bootstrap = *group[static_cast<std::size_t>(r)];
    if (bootstrap.rank() != r || bootstrap.size() != size) throw std::logic_error("wrong rank");
    gatherRounds(bootstrap, 100);
    bootstrap.barrier();
  });
  CHECK(outcomes == nothingThrown(group.size()));
}

/// Rank 2 of 3 does not come: the others say so, and say it again when it comes too late.
void checkMissingRank(const Group& group) {
  for (const std::vector<int>& ranks : {std::vector{0, 1}, std::vector{0, 1, 2}}) {
    const auto outcomes =
        inThreads(ranks, [&](int r) { group[static_cast<std::size_t>(r)]->barrier(); });
    for (const std::size_t r : {0u, 1u}) {
      const std::string& outcome = outcomes[r];
      CAPTURE(outcome);
      CHECK(outcome.starts_with("Timeout: waited 1 s"));
      CHECK(holds(outcome, "have not come: 2."));
    }
  }
}

/// Rank 2 of 3 leaves, before or (mostly, as it starts last) while the others call: they do not
/// wait for the timeout.
void checkLeavingRank(Group group) {
  const auto outcomes = inThreads({0, 1, 2}, [&](int r) {
    auto& bootstrap = group[static_cast<std::size_t>(r)];
    if (r == 2) return bootstrap.reset();
    bootstrap->barrier();
  });
  for (const std::size_t r : {0u, 1u}) {
    const std::string& outcome = outcomes[r];
    CAPTURE(outcome);
    CHECK(outcome.starts_with("PeerFailure: "));
    CHECK(outcome.ends_with(": 2"));
  }
}

/// A rank that leaves at once after a gather takes nothing from those that still read it.
void checkLeavingAfterGather(const std::function<Group()>& make) {
  for (int round = 0; round < 20; ++round) {
    Group group = make();
    const auto outcomes = inThreads(firstRanks(static_cast<int>(group.size())), [&](int r) {
      auto& bootstrap = group[static_cast<std::size_t>(r)];
      gatherRounds(*bootstrap, 1 + round % 2);
      bootstrap.reset();
    });
    REQUIRE(outcomes == nothingThrown(group.size()));
  }
}

// --- Threads ------------------------------------------------------------------------------------

TEST_CASE("local: gathers of different lengths") {
  for (const int size : {1, 2, 5}) {
    CAPTURE(size);
    checkGathers(makeLocalBootstraps(size, kLong));
  }
}

TEST_CASE("local: a rank that does not come is named") {
  checkMissingRank(makeLocalBootstraps(3, kShort));
}

TEST_CASE("local: a rank that leaves is named") {
  for (int round = 0; round < 20; ++round) checkLeavingRank(makeLocalBootstraps(3, kLong));
}

TEST_CASE("local: a rank may leave while others read") {
  checkLeavingAfterGather([] { return makeLocalBootstraps(3, kLong); });
}

TEST_CASE("local: a timeout may be infinite") {
  checkGathers(makeLocalBootstraps(2, Seconds(std::numeric_limits<double>::infinity())));
}

TEST_CASE("local: a group must have ranks and time") {
  CHECK_THROWS_WITH_AS(makeLocalBootstraps(0), "a group has 0 ranks; it must have at least 1",
                       InvalidArgument);
  CHECK_THROWS_WITH_AS(makeLocalBootstraps(2, Seconds(-1)),
                       "a timeout is -1 s; it must be positive", InvalidArgument);
  CHECK_THROWS_AS(makeLocalBootstraps(2, Seconds(std::numeric_limits<double>::quiet_NaN())),
                  InvalidArgument);
}

// --- Files --------------------------------------------------------------------------------------

TEST_CASE("file: gathers of different lengths, by threads") {
  for (const int size : {1, 2, 5}) {
    CAPTURE(size);
    const Folder folder;
    {
      const Group group = makeFileGroup(folder, size);
      checkGathers(group);
      // Only what a slow rank might still have to read.
      CHECK(folder.names().size() == (size == 1 ? 0u : group.size()));
    }
    CHECK(folder.names().empty());
  }
}

TEST_CASE("file: gathers by processes, group after group at one path") {
  const Folder folder;
  std::vector<pid_t> processes;
  for (const int r : {0, 1, 2, 3}) {
    processes.push_back(startProcess([&] {
      for (int i = 0; i < 5; ++i) {
        gatherRounds(*makeFileBootstrap(folder.prefix(), r, 4, kLong), 10 * (i % 2));
      }
    }));
  }
  for (const pid_t process : processes) CHECK(waitFor(process) == 0);
  CHECK(folder.names().empty());
}

TEST_CASE("file: what is given may be large") {
  const Folder folder;
  const Group group = makeFileGroup(folder, 2);
  const Bytes large(3'000'001, std::byte{7});
  std::vector<std::vector<Bytes>> gathered(2);
  const auto outcomes = inThreads({0, 1}, [&](int r) {
    const auto i = static_cast<std::size_t>(r);
    gathered[i] = group[i]->allGather(r == 0 ? large : Bytes{});
  });
  CHECK(outcomes == nothingThrown(2));
  CHECK(gathered == std::vector(2, std::vector{large, Bytes{}}));
}

TEST_CASE("file: a rank that does not start is named by all") {
  const Folder folder;
  const auto outcomes =
      inThreads({0, 1, 3}, [&](int r) { makeFileBootstrap(folder.prefix(), r, 4, kShort); });
  for (const std::string& outcome : outcomes) {
    CAPTURE(outcome);
    CHECK(outcome.starts_with("Timeout: waited 1 s"));
    CHECK(holds(outcome, "have not come: 2."));
  }
  CHECK(folder.names().empty());
}

TEST_CASE("file: without rank 0 there is no group") {
  const Folder folder;
  const auto outcomes =
      inThreads({1, 2}, [&](int r) { makeFileBootstrap(folder.prefix(), r, 3, kShort); });
  for (const std::string& outcome : outcomes) CHECK(holds(outcome, "have not come: 0."));
  CHECK(folder.names().empty());
}

TEST_CASE("file: a rank that does not come to a gather is named") {
  const Folder folder;
  checkMissingRank(makeFileGroup(folder, 3, kShort));
  CHECK(folder.names().empty());
}

TEST_CASE("file: when one has waited long enough, the others need not") {
  const Folder folder;
  Group group(3);
  const auto made = inThreads({0, 1, 2}, [&](int r) {
    const Seconds timeout = r == 0 ? kShort : kLong;
    group[static_cast<std::size_t>(r)] = makeFileBootstrap(folder.prefix(), r, 3, timeout);
  });
  REQUIRE(made == nothingThrown(3));
  const auto outcomes =
      inThreads({0, 1}, [&](int r) { group[static_cast<std::size_t>(r)]->barrier(); });
  CHECK(outcomes[0].starts_with("Timeout: waited 1 s"));
  CHECK(outcomes[1] == outcomes[0]);
}

TEST_CASE("file: a rank that leaves is named") {
  const Folder folder;
  checkLeavingRank(makeFileGroup(folder, 3));
  CHECK(folder.names().empty());
}

TEST_CASE("file: a rank may leave while others read") {
  const Folder folder;
  checkLeavingAfterGather([&] { return makeFileGroup(folder, 3); });
  CHECK(folder.names().empty());
}

TEST_CASE("file: ranks that were given other sizes do not meet") {
  const Folder folder;
  const auto outcomes = inThreads(
      {0, 1}, [&](int r) { makeFileBootstrap(folder.prefix(), r, r == 0 ? 3 : 2, kShort); });
  CHECK(holds(outcomes[0], "Timeout: "));
  CHECK(outcomes[1] == "InvalidArgument: rank 1 was given a group of 2 ranks, and rank 0 one of 3");
  CHECK(folder.names().empty());
}

/// A run of three ranks that all met, and were killed before they removed anything.
std::set<std::string> writeStaleRun(const Folder& folder) {
  const std::string id(32, 'a');
  const std::vector<std::string> nonces{std::string(32, 'b'), std::string(32, 'c'),
                                        std::string(32, 'd')};
  std::string roster = id;
  std::set<std::string> gathers;
  for (std::size_t r = 0; r < nonces.size(); ++r) {
    const std::string rank = "." + std::to_string(r);
    roster.append("\n").append(nonces[r]).append(" 1");
    folder.write("run.hello" + rank, nonces[r]);
    folder.write("run.ack" + rank, id);
    for (const char* const number : {".0", ".1"}) {
      const std::string name = std::string("run.").append(id).append(number).append(rank);
      folder.write(name, "stale");
      gathers.insert(name);
    }
  }
  folder.write("run.roster", roster);
  return gathers;
}

TEST_CASE("file: a complete run of the past deceives nobody") {
  const Folder folder;
  writeStaleRun(folder);
  CHECK(holds(outcomeOf([&] { makeFileBootstrap(folder.prefix(), 0, 3, kShort); }),
              "have not come: 1, 2."));
  writeStaleRun(folder);
  CHECK(holds(outcomeOf([&] { makeFileBootstrap(folder.prefix(), 1, 3, kShort); }),
              "have not come: 0."));
}

TEST_CASE("file: ranks meet among the files of a complete run of the past") {
  for (int round = 0; round < 10; ++round) {
    const Folder folder;
    std::set<std::string> stale = writeStaleRun(folder);
    stale.insert({"run.hello.0", "run.ack.0"});  // rank 0 makes no such files, so replaces none
    checkGathers(makeFileGroup(folder, 3));
    CHECK(folder.names() == stale);
  }
}

TEST_CASE("file: garbage in the files of the past is ignored") {
  const Folder folder;
  folder.write("run.roster", std::string("\0\xff 1 2 3\n\n", 9));
  folder.write("run.hello.1", "");
  folder.write("run.ack.1", "");
  folder.write("run.hello.2", std::string(100'000, 'x'));
  checkGathers(makeFileGroup(folder, 3));
  CHECK(folder.names().empty());
  // What is no nonce must not get into the roster, where it could pass for lines of it.
  folder.write("run.hello.2", "x 1\ny");
  const auto outcomes =
      inThreads({0, 1}, [&](int r) { makeFileBootstrap(folder.prefix(), r, 3, kShort); });
  for (const std::string& outcome : outcomes) CHECK(holds(outcome, "have not come: 2."));
}

TEST_CASE("file: processes that were killed while they met") {
  const Folder folder;
  const auto start = [&](int rank) {
    return startProcess([&] { makeFileBootstrap(folder.prefix(), rank, 3, kLong); });
  };
  const pid_t leader = start(0);
  const pid_t follower = start(1);
  waitUntil([&] { return folder.has("run.ack.1"); });
  killProcess(leader);
  killProcess(follower);
  REQUIRE(folder.has("run.hello.1"));
  REQUIRE(folder.has("run.roster"));
  checkGathers(makeFileGroup(folder, 3));
  CHECK_FALSE(folder.has("run.hello.1"));
  CHECK_FALSE(folder.has("run.roster"));
  CHECK_FALSE(folder.has("run.ack.1"));
}

TEST_CASE("file: a rank that is restarted while the others wait is met") {
  const Folder folder;
  const auto start = [&](int rank) {
    return startProcess(
        [&] { gatherRounds(*makeFileBootstrap(folder.prefix(), rank, 3, kLong), 3); });
  };
  const pid_t leader = start(0);
  const pid_t first = start(1);
  waitUntil([&] { return folder.has("run.ack.1"); });
  killProcess(first);
  // Soon all will have acknowledged a roster, but the first to do so is dead.
  const pid_t last = start(2);
  waitUntil([&] { return folder.read("run.roster").ends_with(" 1"); });
  const pid_t second = start(1);
  for (const pid_t process : {leader, second, last}) CHECK(waitFor(process) == 0);
  CHECK(folder.names().empty());
}

TEST_CASE("file: processes that were killed between gathers") {
  const Folder folder;
  std::vector<pid_t> processes;
  for (const int r : {0, 1}) {
    processes.push_back(startProcess([&] {
      const auto bootstrap = makeFileBootstrap(folder.prefix(), r, 2, kLong);
      gatherRounds(*bootstrap, 3);
      ::_exit(0);
    }));
  }
  for (const pid_t process : processes) REQUIRE(waitFor(process) == 0);
  const std::set<std::string> stale = folder.names();
  REQUIRE(stale.size() >= 2);
  checkGathers(makeFileGroup(folder, 2));
  CHECK(folder.names() == stale);
}

TEST_CASE("file: a fork may neither use nor close a bootstrap") {
  const Folder folder;
  Group group = makeFileGroup(folder, 2);
  const std::set<std::string> before = folder.names();
  const pid_t child = startProcess([&] {
    if (!outcomeOf([&] { group[0]->barrier(); }).starts_with("InvalidArgument: ")) {
      throw std::logic_error("a fork used a bootstrap");
    }
    group.clear();
  });
  CHECK(waitFor(child) == 0);
  CHECK(folder.names() == before);
  checkGathers(group);
}

TEST_CASE("file: arguments") {
  const Folder folder;
  const auto make = [](const std::string& path, int rank, int size, Seconds timeout = kLong) {
    return outcomeOf([&] { makeFileBootstrap(path, rank, size, timeout); });
  };
  CHECK(make(folder.prefix(), 0, 1).empty());
  CHECK(make(folder.prefix(), 2, 2) == "InvalidArgument: the rank is 2; it must be in [0, 2)");
  CHECK(make(folder.prefix(), -1, 2) == "InvalidArgument: the rank is -1; it must be in [0, 2)");
  CHECK(make(folder.prefix(), 0, 0).starts_with("InvalidArgument: a group has 0 ranks"));
  CHECK(make(folder.prefix(), 0, 1, Seconds(0)).starts_with("InvalidArgument: a timeout is 0 s"));
  const std::string folderName = fs::path(folder.prefix()).parent_path().string();
  for (const std::string& path : {std::string(), folderName, folderName + "/"}) {
    CHECK(make(path, 0, 1).starts_with("InvalidArgument: the path of a bootstrap is '" + path));
  }
  const std::string none = folderName + "/none";
  const std::string outcome = make(none + "/run", 0, 1);
  CHECK(outcome.starts_with("InvalidArgument: the path of a bootstrap is '" + none + "/run'"));
  CHECK(outcome.ends_with("but there is no folder " + none));
}

}  // namespace
}  // namespace mscclpp_ep
