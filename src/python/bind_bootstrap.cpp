// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>

#include "bind.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::python {

namespace nb = nanobind;

PythonBootstrap::PythonBootstrap(nb::handle group)
    : group_(group),
      rank_(nb::cast<int>(group.attr("rank"))),
      size_(nb::cast<int>(group.attr("size"))) {
  if (size_ < 1 || rank_ < 0 || rank_ >= size_) {
    throw InvalidArgument("the group has rank " + std::to_string(rank_) + " of size " +
                          std::to_string(size_) + "; rank must be 0 to size - 1");
  }
}

std::vector<Bootstrap::Bytes> PythonBootstrap::allGather(std::span<const std::byte> mine) {
  const nb::gil_scoped_acquire gil;
  const nb::object gathered = group_.attr("all_gather")(nb::bytes(mine.data(), mine.size()));
  std::vector<Bytes> all;
  for (const nb::handle item : gathered) {
    const auto bytes = nb::cast<nb::bytes>(item);
    const auto* data = static_cast<const std::byte*>(bytes.data());
    all.emplace_back(data, data + bytes.size());
  }
  if (all.size() != static_cast<std::size_t>(size_)) {
    throw InvalidArgument("the group's all_gather returned " + std::to_string(all.size()) +
                          " items; it must return one for each of its " + std::to_string(size_) +
                          " ranks");
  }
  return all;
}

void PythonBootstrap::barrier() {
  const nb::gil_scoped_acquire gil;
  group_.attr("barrier")();
}

}  // namespace mscclpp_ep::python
