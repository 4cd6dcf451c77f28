// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_EVENT_HPP_
#define MSCCLPP_EP_EVENT_HPP_

#include <memory>

#include "mscclpp_ep/export.hpp"
#include "mscclpp_ep/stream.hpp"

namespace mscclpp_ep {

/// A point in a stream of a GPU, recorded when this is made. Throws NotBuilt without CUDA,
/// CudaError if something fails.
class MSCCLPP_EP_API Event {
 public:
  /// `device` is the GPU of the stream.
  Event(Stream stream, int device);

  /// Makes a stream of the same GPU wait for the event.
  void wait(Stream stream) const;
  /// Whether what was on the stream is done.
  bool passed() const;
  /// Waits for the event on the host.
  void synchronize() const;

 private:
  std::shared_ptr<void> event_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_EVENT_HPP_
