// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CUDA_AWAIT_HPP_
#define MSCCLPP_EP_CUDA_AWAIT_HPP_

#include <chrono>
#include <thread>

#include "transport/wait.hpp"

namespace mscclpp_ep::cuda {

/// Waits for something of the GPU's, and calls `look` now and then, which may throw. No signal
/// tells the host, so it polls.
template <typename Ready, typename Look>
void awaitWatching(const Ready& ready, const Look& look) {
  constexpr std::chrono::milliseconds kSpin{1};
  constexpr std::chrono::milliseconds kLookPeriod{50};
  if (spinUntil(ready, kSpin)) return;
  auto lookAgain = std::chrono::steady_clock::now() + kLookPeriod;
  while (!ready()) {
    std::this_thread::yield();
    const auto now = std::chrono::steady_clock::now();
    if (now < lookAgain) continue;
    lookAgain = now + kLookPeriod;
    look();
  }
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_AWAIT_HPP_
