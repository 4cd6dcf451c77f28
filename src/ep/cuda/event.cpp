// SPDX-License-Identifier: MIT
#include "mscclpp_ep/event.hpp"

#include "transport/cuda_check.hpp"

namespace mscclpp_ep {

namespace {

struct Recorded {
  Recorded(cudaStream_t stream, int gpu) : device(gpu) {
    const CurrentDevice current(device);
    EP_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cannot make an event");
    const cudaError_t recorded = cudaEventRecord(event, stream);
    if (recorded != cudaSuccess) (void)cudaEventDestroy(event);
    EP_CUDA_TRY(recorded, "cannot record an event");
  }
  ~Recorded() { (void)cudaEventDestroy(event); }
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;

  int device;
  cudaEvent_t event = nullptr;
};

const Recorded& recordedIn(const std::shared_ptr<void>& event) {
  return *static_cast<const Recorded*>(event.get());
}

}  // namespace

Event::Event(Stream stream, int device)
    : event_(std::make_shared<Recorded>(static_cast<cudaStream_t>(stream.handle()), device)) {}

void Event::wait(Stream stream) const {
  const CurrentDevice current(recordedIn(event_).device);
  EP_CUDA_TRY(
      cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle()), recordedIn(event_).event),
      "cannot wait for an event");
}

bool Event::passed() const {
  const RelaxedCapture relaxed;
  const cudaError_t state = cudaEventQuery(recordedIn(event_).event);
  if (state == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  EP_CUDA_TRY(state, "work before an event failed on the GPU");
  return true;
}

void Event::synchronize() const {
  EP_CUDA_TRY(cudaEventSynchronize(recordedIn(event_).event),
              "work before an event failed on the GPU");
}

}  // namespace mscclpp_ep
