// SPDX-License-Identifier: MIT
// Includes every public header and calls a little of the library, to see that it links and loads.
#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "mscclpp_ep/bootstrap.hpp"
#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/dlpack.hpp"
#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/export.hpp"
#include "mscclpp_ep/handle.hpp"
#include "mscclpp_ep/options.hpp"
#include "mscclpp_ep/sizes.hpp"
#include "mscclpp_ep/stream.hpp"
#include "mscclpp_ep/tensor.hpp"
#include "mscclpp_ep/version.hpp"

namespace {

int run() {
  std::printf("mscclpp_ep %d.%d.%d\n", MSCCLPP_EP_VERSION_MAJOR, MSCCLPP_EP_VERSION_MINOR,
              MSCCLPP_EP_VERSION_PATCH);
  if (mscclpp_ep::recvCapacity(128, 4) != 512) {
    std::puts("recvCapacity(128, 4) is not 512");
    return 1;
  }
  // Exceptions must keep their type across the library's boundary.
  try {
    mscclpp_ep::makeLocalBootstraps(0);
  } catch (const mscclpp_ep::InvalidArgument& error) {
    std::printf("refused as it should be: %s\n", error.what());
  }
  std::vector<std::shared_ptr<mscclpp_ep::Bootstrap>> groups = mscclpp_ep::makeLocalBootstraps(1);
  mscclpp_ep::Buffer buffer(*groups.front());
  buffer.destroy();
  std::printf("rank %d of %d\n", buffer.rank(), buffer.size());
  return 0;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::printf("failed: %s\n", error.what());
    return 1;
  }
}
