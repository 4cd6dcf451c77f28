// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "array.hpp"
#include "bind.hpp"
#include "mscclpp_ep/diagnostics.hpp"

namespace {

using Bytes = nanobind::ndarray<std::uint8_t, nanobind::ndim<1>, nanobind::c_contig>;
using ConstBytes = nanobind::ndarray<const std::uint8_t, nanobind::ndim<1>, nanobind::c_contig>;

void streamCopy(const Bytes& out, const ConstBytes& in) {
  const std::size_t bytes = std::min(out.size(), in.size());
  const nanobind::gil_scoped_release release;
  mscclpp_ep::streamCopy(out.data(), in.data(), bytes);
}

nanobind::list describeGpus() {
  nanobind::list list;
  for (const mscclpp_ep::GpuInfo& gpu : mscclpp_ep::gpus()) {
    nanobind::dict facts;
    facts["name"] = gpu.name;
    facts["total_bytes"] = gpu.totalBytes;
    facts["free_bytes"] = gpu.freeBytes;
    facts["multiprocessors"] = gpu.multiprocessors;
    facts["capability"] = nanobind::make_tuple(gpu.capabilityMajor, gpu.capabilityMinor);
    facts["posix_handles"] = gpu.posixHandles;
    nanobind::list peers;
    for (const bool reaches : gpu.reaches) peers.append(reaches);
    facts["peers"] = peers;
    list.append(facts);
  }
  return list;
}

nanobind::tuple describeCuda() {
  const mscclpp_ep::CudaVersions versions = mscclpp_ep::cudaVersions();
  return nanobind::make_tuple(versions.runtime, versions.driver);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The C++ library, as mscclpp_ep's Python code calls it. Not a public interface.";
  m.def("build_info", &mscclpp_ep::buildInfo, "What this build has; \"no\" for what it lacks.");
  m.def("is_cuda_built", &mscclpp_ep::isCudaBuilt, "Whether this build has the CUDA backend.");
  m.def("cuda_devices", &describeGpus, "What the GPUs of this process are.");
  m.def("cuda_versions", &describeCuda,
        "Of the runtime and the driver, as CUDA numbers them; 0: there is none.");
  m.def("cuda_device_count", &mscclpp_ep::cudaDeviceCount, "GPUs that this process can use.");
  m.def("stream_copy", &streamCopy, nanobind::arg("out").noconvert(), nanobind::arg("src"),
        "Copies bytes as rows are: for measuring what the memory allows.");
  mscclpp_ep::python::bindErrors(m);
  mscclpp_ep::python::bindTypes(m);
  mscclpp_ep::python::bindBuffer(m);
  mscclpp_ep::python::bindEvent(m);
}
