// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_WORKERS_HPP_
#define MSCCLPP_EP_CPU_WORKERS_HPP_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>

namespace mscclpp_ep::cpu {

/// The threads of a rank that move data: its caller and some helpers.
class Workers {
 public:
  /// Throws SystemError if the system refuses a thread.
  explicit Workers(int numThreads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int numThreads() const { return numThreads_; }

  /// Calls `work(begin, end)` for parts of [0, count) of at most `grain`, on all threads, and
  /// returns when all are done, their streaming stores fenced. Throws the first exception of any.
  void run(std::int64_t count, std::int64_t grain,
           const std::function<void(std::int64_t, std::int64_t)>& work);

 private:
  struct State;

  const pid_t process_;
  const int numThreads_;
  std::unique_ptr<State> state_;
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_WORKERS_HPP_
