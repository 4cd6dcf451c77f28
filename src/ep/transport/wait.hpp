// SPDX-License-Identifier: MIT
// Waiting for a word that another rank writes: a short spin, then sleep on the rank's doorbell.
#ifndef MSCCLPP_EP_TRANSPORT_WAIT_HPP_
#define MSCCLPP_EP_TRANSPORT_WAIT_HPP_

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace mscclpp_ep {

/// Words in memory that ranks share. All are sequentially consistent: a rank that goes to sleep
/// writes `waiting` and then reads what it waits for, the one that wakes it does it the other way
/// round, and one of the two must see the other's store.
using SharedWord = std::atomic<std::uint64_t>;
static_assert(SharedWord::is_always_lock_free && sizeof(SharedWord) == 8);

inline SharedWord& sharedWord(std::byte* base, std::size_t offset) {
  return *reinterpret_cast<SharedWord*>(base + offset);
}

/// One for each rank, in its control segment.
class Doorbell {
 public:
  Doorbell(std::byte* count, std::byte* waiting)
      : count_(*reinterpret_cast<std::atomic<std::uint32_t>*>(count)),
        waiting_(*reinterpret_cast<std::atomic<std::uint32_t>*>(waiting)) {}

  /// Wakes the owner if it sleeps. Comes after the store that it is to see.
  void ring() const;

  /// Owner: sleeps until rung, at most for `limit`, unless `ready()` turns true first.
  bool sleep(const std::function<bool()>& ready, std::chrono::nanoseconds limit) const;

 private:
  std::atomic<std::uint32_t>& count_;
  std::atomic<std::uint32_t>& waiting_;
};

/// Tells the processor that this is a spin.
inline void pauseSpin() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Spins until `ready()`, at most for `limit`.
template <typename Ready>
bool spinUntil(const Ready& ready, std::chrono::nanoseconds limit) {
  constexpr int kSpinsPerLook = 32;
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kSpinsPerLook; ++i) {
      if (ready()) return true;
      pauseSpin();
    }
  } while (std::chrono::steady_clock::now() - start < limit);
  return false;
}

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_WAIT_HPP_
