// SPDX-License-Identifier: MIT
#include "mscclpp_ep/event.hpp"

#include "cuda/streams.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep {

namespace {

struct Recorded {
  Recorded(cudaStream_t stream, int gpu) : device(gpu), event(stream) {}

  int device;
  cuda::StreamEvent event;
};

const Recorded& recordedIn(const std::shared_ptr<void>& event) {
  return *static_cast<const Recorded*>(event.get());
}

}  // namespace

Event::Event(Stream stream, int device) {
  const CurrentDevice current(device);
  event_ = std::make_shared<Recorded>(static_cast<cudaStream_t>(stream.handle()), device);
}

void Event::wait(Stream stream) const {
  const Recorded& recorded = recordedIn(event_);
  const CurrentDevice current(recorded.device);
  recorded.event.hold(static_cast<cudaStream_t>(stream.handle()));
}

bool Event::passed() const { return recordedIn(event_).event.passed(); }

void Event::synchronize() const { recordedIn(event_).event.synchronize(); }

}  // namespace mscclpp_ep
