// SPDX-License-Identifier: MIT
// Stands in for the CUDA backend in a library that is built without it.
#include "core/backend.hpp"
#include "mscclpp_ep/diagnostics.hpp"
#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/event.hpp"

namespace mscclpp_ep {

std::shared_ptr<Backend> makeCudaBackend(Bootstrap& bootstrap, const Admission&, BufferOptions&,
                                         std::uint64_t) {
  const char* why =
      "device is \"cuda\", but this build of mscclpp_ep has no CUDA backend; use \"cpu\"";
  declineToConnect(bootstrap, why);
  throw NotBuilt(why);
}

namespace {

[[noreturn]] void throwNoEvents() {
  throw NotBuilt("this build of mscclpp_ep has no CUDA backend, and no events of its streams");
}

}  // namespace

Event::Event(Stream, int) { throwNoEvents(); }
void Event::wait(Stream) const { throwNoEvents(); }
bool Event::passed() const { throwNoEvents(); }
void Event::synchronize() const { throwNoEvents(); }

bool isCudaBuilt() { return false; }
int cudaDeviceCount() { return 0; }
std::vector<GpuInfo> gpus() { return {}; }
CudaVersions cudaVersions() { return {}; }

}  // namespace mscclpp_ep
