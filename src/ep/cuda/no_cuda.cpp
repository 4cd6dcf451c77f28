// SPDX-License-Identifier: MIT
// Stands in for the CUDA backend in a library that is built without it.
#include "core/backend.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep {

std::shared_ptr<Backend> makeCudaBackend(Bootstrap& bootstrap, const Admission&, BufferOptions&,
                                         std::uint64_t) {
  const char* why =
      "device is \"cuda\", but this build of mscclpp_ep has no CUDA backend; use \"cpu\"";
  declineToConnect(bootstrap, why);
  throw NotBuilt(why);
}

}  // namespace mscclpp_ep
