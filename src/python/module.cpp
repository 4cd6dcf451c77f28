// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "bind.hpp"
#include "mscclpp_ep/build_info.hpp"

NB_MODULE(_core, m) {
  m.doc() = "The C++ library, as mscclpp_ep's Python code calls it. Not a public interface.";
  m.def("build_info", &mscclpp_ep::buildInfo, "What this build has; \"no\" for what it lacks.");
  mscclpp_ep::python::bindErrors(m);
  mscclpp_ep::python::bindTypes(m);
  mscclpp_ep::python::bindBuffer(m);
}
