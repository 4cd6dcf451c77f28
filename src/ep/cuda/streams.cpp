// SPDX-License-Identifier: MIT
#include "cuda/streams.hpp"

#include <algorithm>
#include <mutex>
#include <utility>

namespace mscclpp_ep::cuda {

namespace {

cudaGraph_t graphOf(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  const cudaError_t found = cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph);
#else
  const cudaError_t found = cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph);
#endif
  EP_CUDA_TRY(found, "cannot tell which graph is captured");
  return graph;
}

/// What graphs kept that are no more.
struct Graveyard {
  std::mutex mutex;
  std::vector<std::shared_ptr<const void>> dead;
};

Graveyard& graveyard() {
  static auto& instance = *new Graveyard;
  return instance;
}

void dieWithGraph(void* held) {
  const std::unique_ptr<std::shared_ptr<const void>> owner(
      static_cast<std::shared_ptr<const void>*>(held));
  const std::lock_guard lock(graveyard().mutex);
  graveyard().dead.push_back(std::move(*owner));
}

}  // namespace

void buryDead() {
  // Declared before the lock, and so destroyed after it.
  std::vector<std::shared_ptr<const void>> dead;
  const std::lock_guard lock(graveyard().mutex);
  dead.swap(graveyard().dead);
}

void keepWithGraph(cudaStream_t stream, const std::shared_ptr<const void>& owner) {
  const cudaGraph_t graph = graphOf(stream);
  auto held = std::make_unique<std::shared_ptr<const void>>(owner);
  cudaUserObject_t object = nullptr;
  EP_CUDA_TRY(
      cudaUserObjectCreate(&object, held.get(), dieWithGraph, 1, cudaUserObjectNoDestructorSync),
      "cannot let a graph keep memory");
  // The object has it now.
  [[maybe_unused]] const auto* const owned = held.release();
  EP_CUDA_TRY(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove),
              "cannot let a graph keep memory");
}

class UserStreams::Behind final : public Fence {
 public:
  explicit Behind(const UserStreams& streams) : streams_(streams) {
    for (const cudaStream_t stream : streams.users_) {
      events_.push_back(std::make_unique<StreamEvent>(stream));
    }
    if (streams.strict_) events_.push_back(std::make_unique<StreamEvent>(streams.comm_));
  }

  bool passed() override {
    if (streams_.capturing_) return false;
    if (streams_.mayWait_ && !streams_.strict_) {
      for (const auto& event : events_) event->hold(streams_.comm_);
      return true;
    }
    return std::all_of(events_.begin(), events_.end(),
                       [](const auto& event) { return event->passed(); });
  }

 private:
  const UserStreams& streams_;
  std::vector<std::unique_ptr<StreamEvent>> events_;
};

void UserStreams::lookForCapture() {
  capturing_.reset();
  if (isCapturing(comm_)) capturing_ = comm_;
  for (const cudaStream_t stream : users_) {
    if (!capturing_ && isCapturing(stream)) capturing_ = stream;
  }
  everCaptured_ = everCaptured_ || capturing_.has_value();
}

std::vector<std::unique_ptr<StreamEvent>> UserStreams::ends() const {
  std::vector<std::unique_ptr<StreamEvent>> events;
  const auto add = [&](cudaStream_t stream) {
    if (!isCapturing(stream)) events.push_back(std::make_unique<StreamEvent>(stream));
  };
  add(comm_);
  if (everCaptured_) std::for_each(users_.begin(), users_.end(), add);
  return events;
}

std::unique_ptr<Fence> UserStreams::fence() {
  if (capturing_) return nullptr;
  return std::make_unique<Behind>(*this);
}

void CallOrder::join() {
  forget();
  if (const auto callers = std::exchange(toJoin_, std::nullopt)) {
    orderStreams(*callers, operations_);
  }
}

void CallOrder::end(cudaStream_t callers) {
  orderStreams(operations_, callers);
  // Of each thread, the latter is another stream.
  if (callers != cudaStreamPerThread) behind_ = callers;
}

}  // namespace mscclpp_ep::cuda
