// SPDX-License-Identifier: MIT
#include "cpu/workers.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/check.hpp"
#include "cpu/simd.hpp"

namespace mscclpp_ep::cpu {

using Work = std::function<void(std::int64_t, std::int64_t)>;

struct Workers::State {
  ~State();
  void start(int numHelpers);
  void run(std::int64_t newCount, std::int64_t newGrain, const Work& newWork);
  void helperLoop();
  void takeParts();

  std::mutex mutex;
  std::condition_variable wake;
  std::condition_variable finished;
  std::uint64_t generation = 0;
  int active = 0;
  bool stopping = false;
  std::exception_ptr failure;

  const Work* work = nullptr;
  std::atomic<std::int64_t> next{0};
  std::int64_t count = 0;
  std::int64_t grain = 1;
  std::vector<std::thread> helpers;
};

Workers::State::~State() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
  }
  wake.notify_all();
  for (std::thread& helper : helpers) helper.join();
}

void Workers::State::start(int numHelpers) {
  helpers.reserve(static_cast<std::size_t>(numHelpers));
  try {
    for (int i = 0; i < numHelpers; ++i) helpers.emplace_back([this] { helperLoop(); });
  } catch (const std::system_error& error) {
    throw SystemError(cat("the system refused thread ", helpers.size() + 2, " of ", numHelpers + 1,
                          " (", error.what(), "); give a smaller num_threads"));
  }
}

void Workers::State::run(std::int64_t newCount, std::int64_t newGrain, const Work& newWork) {
  {
    const std::lock_guard lock(mutex);
    work = &newWork;
    count = newCount;
    grain = newGrain;
    next.store(0);
    active = static_cast<int>(helpers.size());
    ++generation;
  }
  wake.notify_all();
  takeParts();
  std::unique_lock lock(mutex);
  finished.wait(lock, [this] { return active == 0; });
  if (failure != nullptr) std::rethrow_exception(std::exchange(failure, nullptr));
}

void Workers::State::helperLoop() {
  const FloatingPointModes modes;
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex);
  while (true) {
    wake.wait(lock, [&] { return stopping || generation != seen; });
    if (stopping) return;
    seen = generation;
    lock.unlock();
    takeParts();
    lock.lock();
    if (--active == 0) finished.notify_one();
  }
}

void Workers::State::takeParts() {
  try {
    while (true) {
      const std::int64_t begin = next.fetch_add(grain);
      if (begin >= count) break;
      (*work)(begin, std::min(begin + grain, count));
    }
  } catch (...) {
    const std::lock_guard lock(mutex);
    if (failure == nullptr) failure = std::current_exception();
  }
  streamFence();
}

Workers::Workers(int numThreads)
    : process_(::getpid()), numThreads_(numThreads), state_(std::make_unique<State>()) {
  state_->start(numThreads - 1);
}

Workers::~Workers() {
  // In a forked child the helpers do not exist, and waiting for them would not end.
  if (::getpid() != process_) [[maybe_unused]]
    State* const leaked = state_.release();
}

void Workers::run(std::int64_t count, std::int64_t grain, const Work& work) {
  if (numThreads_ > 1 && count > grain) {
    state_->run(count, grain, work);
    return;
  }
  if (count > 0) work(0, count);
  streamFence();
}

}  // namespace mscclpp_ep::cpu
