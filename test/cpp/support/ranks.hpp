// SPDX-License-Identifier: MIT
// Runs a program as several ranks: threads of this process, or processes of their own.
#ifndef MSCCLPP_EP_TEST_SUPPORT_RANKS_HPP_
#define MSCCLPP_EP_TEST_SUPPORT_RANKS_HPP_

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "mscclpp_ep/bootstrap.hpp"

// ThreadSanitizer knows the threads of one process only.
#if defined(__SANITIZE_THREAD__)
#define MSCCLPP_EP_TEST_PROCESSES 0
#else
#define MSCCLPP_EP_TEST_PROCESSES 1
#endif

namespace mscclpp_ep::testing {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// After this a program hangs, and the test fails.
inline constexpr std::chrono::seconds kHangLimit{kSanitized ? 120 : 40};
/// For waits that are to end well.
inline constexpr std::chrono::duration<double> kLongTimeout{100};

using Program = std::function<void(Bootstrap&)>;

/// Throws unless `condition`: ranks report to whoever runs them, in whatever process that is.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error(cat("required: ", parts...));
}

template <typename A, typename B>
void requireEqual(const A& found, const B& expected, const std::string& what) {
  if (!(found == expected)) {
    throw std::runtime_error(cat(what, " is ", found, " instead of ", expected));
  }
}

/// The message of the error of class E that `work` throws; throws if it throws none.
template <typename E>
std::string errorOf(const std::function<void()>& work, const std::string& what) {
  try {
    work();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    throw std::runtime_error(cat(what, ": threw an error of another class: ", error.what()));
  }
  throw std::runtime_error(cat(what, ": nothing was thrown"));
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Ends the program, with a message, if it lives longer than kHangLimit.
class Watchdog {
 public:
  explicit Watchdog(std::string what) : what_(std::move(what)), thread_([this] { watch(); }) {}
  ~Watchdog() {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    over_.notify_all();
    thread_.join();
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    if (over_.wait_for(lock, kHangLimit, [this] { return done_; })) return;
    std::fprintf(stderr, "%s hangs: it has run for %lld s\n", what_.c_str(),
                 static_cast<long long>(kHangLimit.count()));
    std::abort();
  }

  const std::string what_;
  std::mutex mutex_;
  std::condition_variable over_;
  bool done_ = false;
  std::thread thread_;
};

/// What went wrong on a rank that threw, or null.
using Outcomes = std::vector<std::exception_ptr>;

/// Runs `work(i)` in `count` threads.
inline Outcomes outcomesOfThreads(int count, const std::function<void(int)>& work) {
  const Watchdog watchdog("a program of several threads");
  Outcomes outcomes(static_cast<std::size_t>(count));
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        work(i);
      } catch (...) {
        outcomes[static_cast<std::size_t>(i)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

inline void rethrowFirst(const Outcomes& outcomes) {
  for (const std::exception_ptr& outcome : outcomes) {
    if (outcome != nullptr) std::rethrow_exception(outcome);
  }
}

inline void runThreads(int count, const std::function<void(int)>& work) {
  rethrowFirst(outcomesOfThreads(count, work));
}

/// Runs `program` on `size` ranks, threads of this process. The error of the first rank that threw
/// is rethrown.
inline void runAsThreads(int size, const Program& program) {
  auto bootstraps = makeLocalBootstraps(size, kLongTimeout);
  runThreads(size, [&](int rank) {
    // The rank owns its bootstrap, so that its end is noticed by those who wait for it.
    const auto own = std::move(bootstraps[static_cast<std::size_t>(rank)]);
    program(*own);
  });
}

#if MSCCLPP_EP_TEST_PROCESSES

/// A folder that is removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "mscclpp_ep_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

/// A forked process, whose error, if it throws one, comes back through a pipe.
class ChildProcess {
 public:
  explicit ChildProcess(const std::function<void()>& work) {
    int ends[2];
    if (::pipe(ends) != 0) throw std::runtime_error("cannot make a pipe");
    std::fflush(nullptr);
    id_ = ::fork();
    if (id_ < 0) throw std::runtime_error("cannot fork");
    if (id_ == 0) {
      ::close(ends[0]);
      runAndExit(work, ends[1]);
    }
    ::close(ends[1]);
    errors_ = ends[0];
  }
  ~ChildProcess() {
    if (id_ > 0) finish();
    ::close(errors_);
  }
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  /// Waits for its end. Empty if it ended well, else what went wrong.
  std::string finish() {
    std::string text;
    char part[512];
    for (ssize_t n = 0; (n = ::read(errors_, part, sizeof(part))) > 0;) {
      text.append(part, static_cast<std::size_t>(n));
    }
    int status = 0;
    ::waitpid(std::exchange(id_, 0), &status, 0);
    if (WIFSIGNALED(status)) {
      const int signal = WTERMSIG(status);
      return signal == SIGALRM ? cat(text, " hangs") : cat(text, " signal ", signal);
    }
    return WEXITSTATUS(status) == 0 ? std::string() : cat(text, " (it failed)");
  }

 private:
  [[noreturn]] static void runAndExit(const std::function<void()>& work, int errors) {
    ::signal(SIGALRM, SIG_DFL);
    ::alarm(static_cast<unsigned>(kHangLimit.count()));
    int code = 1;
    std::string text;
    try {
      work();
      code = 0;
    } catch (const std::exception& error) {
      text = error.what();
    } catch (...) {
      text = "threw something";
    }
    if (::write(errors, text.data(), text.size()) < 0) code = 2;
    ::_exit(code);
  }

  pid_t id_ = 0;
  int errors_ = -1;
};

/// Runs `work(rank)` in processes of their own; what each ended with, empty if well.
inline std::vector<std::string> endsOfProcesses(int size, const std::function<void(int)>& work) {
  std::vector<std::unique_ptr<ChildProcess>> children;
  for (int rank = 0; rank < size; ++rank) {
    children.push_back(std::make_unique<ChildProcess>([&, rank] { work(rank); }));
  }
  std::vector<std::string> ends;
  for (const auto& child : children) ends.push_back(child->finish());
  return ends;
}

/// Runs `program` on `size` ranks, processes of their own. The first one's error is thrown.
inline void runAsProcesses(int size, const Program& program) {
  const TemporaryFolder folder;
  const auto ends = endsOfProcesses(size, [&](int rank) {
    const auto bootstrap = makeFileBootstrap(folder.path() + "/group", rank, size, kLongTimeout);
    program(*bootstrap);
  });
  for (std::size_t rank = 0; rank < ends.size(); ++rank) {
    if (!ends[rank].empty()) throw std::runtime_error(cat("rank ", rank, ": ", ends[rank]));
  }
}

#endif  // MSCCLPP_EP_TEST_PROCESSES

/// The ways to run ranks that this build has.
struct Launcher {
  const char* name;
  void (*run)(int size, const Program& program);
};
inline constexpr Launcher kLaunchers[] = {
    {"threads", runAsThreads},
#if MSCCLPP_EP_TEST_PROCESSES
    {"processes", runAsProcesses},
#endif
};

}  // namespace mscclpp_ep::testing

#endif  // MSCCLPP_EP_TEST_SUPPORT_RANKS_HPP_
