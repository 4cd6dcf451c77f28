// SPDX-License-Identifier: MIT
#include "cpu/workers.hpp"

#include <algorithm>

#include "cpu/simd.hpp"

namespace mscclpp_ep::cpu {

Workers::Workers(int numThreads) {
  threads_.reserve(static_cast<std::size_t>(numThreads - 1));
  for (int i = 1; i < numThreads; ++i) threads_.emplace_back([this] { helperLoop(); });
}

Workers::~Workers() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::run(std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t, std::int64_t)>& work) {
  if (threads_.empty() || count <= grain) {
    if (count > 0) work(0, count);
    streamFence();
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    work_ = &work;
    count_ = count;
    grain_ = grain;
    next_.store(0);
    active_ = static_cast<int>(threads_.size());
    ++generation_;
  }
  wake_.notify_all();
  takeParts();
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [this] { return active_ == 0; });
}

void Workers::helperLoop() {
  const FloatingPointModes modes;
  std::uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
    if (stopping_) return;
    seen = generation_;
    lock.unlock();
    takeParts();
    lock.lock();
    if (--active_ == 0) finished_.notify_one();
  }
}

void Workers::takeParts() {
  while (true) {
    const std::int64_t begin = next_.fetch_add(grain_);
    if (begin >= count_) break;
    (*work_)(begin, std::min(begin + grain_, count_));
  }
  streamFence();
}

}  // namespace mscclpp_ep::cpu
