// SPDX-License-Identifier: MIT
// In which order streams use memory.
#ifndef MSCCLPP_EP_CUDA_STREAMS_HPP_
#define MSCCLPP_EP_CUDA_STREAMS_HPP_

#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "host/returned_blocks.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

/// A point in a stream of the current GPU.
class StreamEvent {
 public:
  explicit StreamEvent(cudaStream_t stream) {
    EP_CUDA_TRY(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cannot make an event");
    const cudaError_t recorded = cudaEventRecord(event_, stream);
    if (recorded != cudaSuccess) (void)cudaEventDestroy(event_);
    EP_CUDA_TRY(recorded, "cannot record an event");
  }
  ~StreamEvent() { (void)cudaEventDestroy(event_); }
  StreamEvent(const StreamEvent&) = delete;
  StreamEvent& operator=(const StreamEvent&) = delete;

  bool passed() const {
    const RelaxedCapture relaxed;
    return isDone(cudaEventQuery(event_), "work before an event failed on the GPU");
  }
  void synchronize() const {
    EP_CUDA_TRY(cudaEventSynchronize(event_), "work before an event failed on the GPU");
  }
  void hold(cudaStream_t stream) const {
    EP_CUDA_TRY(cudaStreamWaitEvent(stream, event_, 0), "cannot wait for an event");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

/// Makes `later` wait for what is on `earlier` now.
inline void orderStreams(cudaStream_t earlier, cudaStream_t later) {
  if (earlier != later) StreamEvent(earlier).hold(later);
}

/// Whether what is enqueued on a stream is recorded for a graph, instead of run.
inline bool isCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t found = cudaStreamIsCapturing(stream, &status);
  if (found == cudaErrorStreamCaptureImplicit) {
    // The default stream, while another one, that waits for it, is capturing.
    (void)cudaGetLastError();
    return false;
  }
  EP_CUDA_TRY(found, "cannot tell whether a graph is captured");
  return status != cudaStreamCaptureStatusNone;
}

/// Lets the graph that a stream captures, and all that is made of it, keep what `owner` holds. When
/// the graph is destroyed that is let go of by the next buryDead(), as CUDA may not be called
/// there.
void keepWithGraph(cudaStream_t stream, const std::shared_ptr<const void>& owner);

void buryDead();

/// The streams on which the memory of a buffer is used. Memory that was dropped is free when all of
/// them have got past that: then, or at once, if the stream of the buffer's operations, which is
/// the next to use it, may be made to wait for them.
class UserStreams {
 public:
  explicit UserStreams(cudaStream_t comm) : comm_(comm) {}

  void add(cudaStream_t stream) {
    if (stream != comm_) users_.insert(stream);
  }
  void remove(cudaStream_t stream) { users_.erase(stream); }
  /// Whether the stream of operations may wait for others than its call names.
  void allowWaiting(bool allowed) { mayWait_ = allowed; }
  /// From now on memory is free only when all has passed that uses it, on the stream of operations
  /// as well: peers may have written to it that this rank goes on without.
  void beStrict() { strict_ = true; }
  /// Finds out whether a graph is captured, by the calls that follow on one of the streams.
  void lookForCapture();
  /// The stream by which that is so; none: no graph is captured.
  std::optional<cudaStream_t> capturing() const { return capturing_; }
  /// Whether only the stream of operations and this one use memory.
  bool areOnly(cudaStream_t stream) const {
    return users_.empty() || (users_.size() == 1 && *users_.begin() == stream);
  }
  /// Whether one ever was: it may be running now, on any stream.
  bool everCaptured() const { return everCaptured_; }

  /// Behind what is enqueued now of operations: on their stream, and on those of users if graphs
  /// may be running there. What is being captured has no end.
  std::vector<std::unique_ptr<StreamEvent>> ends() const;

  /// A fence behind what is enqueued now; null while a graph is captured, of which other streams
  /// are no part.
  std::unique_ptr<Fence> fence();

 private:
  class Behind;

  cudaStream_t comm_;
  std::set<cudaStream_t> users_;
  bool mayWait_ = true;
  bool strict_ = false;
  std::optional<cudaStream_t> capturing_;
  bool everCaptured_ = false;
};

/// How the stream of operations and that of a call stand to each other.
class CallOrder {
 public:
  explicit CallOrder(cudaStream_t operations) : operations_(operations) {}

  /// Operations are to come behind what is on this stream of a caller's: they do from join() on.
  void begin(cudaStream_t callers) { toJoin_ = callers; }
  std::optional<cudaStream_t> toJoin() const { return toJoin_; }
  /// Before something is enqueued on the stream of operations, which none is behind any more.
  void join();
  /// The same, if operations are yet to be put behind a stream.
  void joinIfBegun() {
    if (toJoin_) join();
  }
  /// Puts the caller's stream behind all operations.
  void end(cudaStream_t callers);
  /// Whether the stream that operations are yet to be put behind is behind all of them itself:
  /// what is enqueued there is in order as well.
  bool callersIsBehind() const { return toJoin_ && toJoin_ == behind_; }
  /// No stream is taken to be behind operations any more.
  void forget() { behind_.reset(); }

 private:
  cudaStream_t operations_;
  std::optional<cudaStream_t> toJoin_;
  std::optional<cudaStream_t> behind_;
};

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_STREAMS_HPP_
