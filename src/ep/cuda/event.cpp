// SPDX-License-Identifier: MIT
#include "mscclpp_ep/event.hpp"

#include "transport/cuda_check.hpp"

namespace mscclpp_ep {

Event::Event(Stream stream, int device) : device_(device) {
  const CurrentDevice current(device);
  cudaEvent_t made = nullptr;
  EP_CUDA_TRY(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "cannot make an event");
  event_ = {made, [](void* event) { (void)cudaEventDestroy(static_cast<cudaEvent_t>(event)); }};
  EP_CUDA_TRY(cudaEventRecord(made, static_cast<cudaStream_t>(stream.handle())),
              "cannot record an event");
}

void Event::wait(Stream stream) const {
  const CurrentDevice current(device_);
  EP_CUDA_TRY(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream.handle()),
                                  static_cast<cudaEvent_t>(event_.get())),
              "cannot wait for an event");
}

bool Event::passed() const {
  const RelaxedCapture relaxed;
  const cudaError_t state = cudaEventQuery(static_cast<cudaEvent_t>(event_.get()));
  if (state == cudaErrorNotReady) return false;
  EP_CUDA_TRY(state, "work before an event failed on the GPU");
  return true;
}

void Event::synchronize() const {
  EP_CUDA_TRY(cudaEventSynchronize(static_cast<cudaEvent_t>(event_.get())),
              "work before an event failed on the GPU");
}

}  // namespace mscclpp_ep
