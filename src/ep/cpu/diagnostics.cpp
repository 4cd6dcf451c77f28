// SPDX-License-Identifier: MIT
#include "mscclpp_ep/diagnostics.hpp"

#include "core/check.hpp"
#include "cpu/simd.hpp"
#include "mscclpp_ep/version.hpp"

namespace mscclpp_ep {

std::map<std::string, std::string> buildInfo() {
  std::string available;
  for (const cpu::RowKernels* kernels : cpu::availableRowKernels()) {
    available += cat(available.empty() ? "" : ", ", kernels->name);
  }
  return {
      {"version",
       cat(MSCCLPP_EP_VERSION_MAJOR, ".", MSCCLPP_EP_VERSION_MINOR, ".", MSCCLPP_EP_VERSION_PATCH)},
      {"compiler", cat("gcc-compatible ", __VERSION__)},
      {"simd", std::string(cpu::rowKernels().name)},
      {"simd_available", available},
      {"cuda", isCudaBuilt() ? "yes" : "no"},
      {"mscclpp", "no"},
      {"ucx", "no"},
  };
}

void streamCopy(void* out, const void* in, std::size_t bytes) {
  cpu::rowKernels().streamCopy(out, in, bytes);
  cpu::streamFence();
}

}  // namespace mscclpp_ep
