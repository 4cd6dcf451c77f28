// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_WORKERS_HPP_
#define MSCCLPP_EP_CPU_WORKERS_HPP_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace mscclpp_ep::cpu {

/// The threads of a rank that move data: its caller and some helpers.
class Workers {
 public:
  explicit Workers(int numThreads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int numThreads() const { return static_cast<int>(threads_.size()) + 1; }

  /// Calls `work(begin, end)` for parts of [0, count) of at most `grain`, on all threads, and
  /// returns when all are done, their streaming stores fenced. Work must not throw.
  void run(std::int64_t count, std::int64_t grain,
           const std::function<void(std::int64_t, std::int64_t)>& work);

 private:
  void helperLoop();
  void takeParts();

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable finished_;
  std::uint64_t generation_ = 0;
  int active_ = 0;
  bool stopping_ = false;

  const std::function<void(std::int64_t, std::int64_t)>* work_ = nullptr;
  std::atomic<std::int64_t> next_{0};
  std::int64_t count_ = 0;
  std::int64_t grain_ = 1;
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_WORKERS_HPP_
