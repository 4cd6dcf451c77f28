// SPDX-License-Identifier: MIT
#include "transport/wait.hpp"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace mscclpp_ep {

namespace {

// std::atomic::wait is private to a process in libstdc++, and these words are shared.
void futexWait(std::atomic<std::uint32_t>& word, std::uint32_t seen,
               std::chrono::nanoseconds limit) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(limit);
  timespec time{};
  time.tv_sec = seconds.count();
  time.tv_nsec = (limit - seconds).count();
  ::syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);
}

void futexWakeAll(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

void Doorbell::ring() const {
  if (waiting_.load() == 0) return;
  count_.fetch_add(1);
  futexWakeAll(count_);
}

bool Doorbell::sleep(const std::function<bool()>& ready, std::chrono::nanoseconds limit) const {
  const std::uint32_t seen = count_.load();
  waiting_.store(1);
  bool done = ready();
  if (!done) {
    futexWait(count_, seen, limit);
    done = ready();
  }
  waiting_.store(0);
  return done;
}

}  // namespace mscclpp_ep
