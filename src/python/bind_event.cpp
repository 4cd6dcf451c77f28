// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>

#include <cstdint>

#include "bind.hpp"
#include "mscclpp_ep/event.hpp"

namespace mscclpp_ep::python {

namespace nb = nanobind;

void bindEvent(nb::module_& m) {
  nb::class_<Event>(m, "Event", "A point in a stream of a GPU.")
      .def(
          "__init__",
          [](Event* self, std::uintptr_t stream, int device) {
            new (self) Event(streamOf(stream), device);
          },
          nb::arg("stream"), nb::arg("device"))
      .def(
          "wait", [](const Event& self, std::uintptr_t stream) { self.wait(streamOf(stream)); },
          nb::arg("stream"), "Makes a stream wait for the event.")
      .def("passed", &Event::passed)
      .def("synchronize", &Event::synchronize, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace mscclpp_ep::python
