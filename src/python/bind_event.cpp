// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>

#include "bind.hpp"
#include "exchange.hpp"
#include "mscclpp_ep/event.hpp"

namespace mscclpp_ep::python {

namespace nb = nanobind;

void bindEvent(nb::module_& m) {
  m.def(
      "current_stream",
      [](nb::handle type, int gpu) -> std::optional<std::uintptr_t> {
        const Exchange exchange(type);
        if (!exchange) return std::nullopt;
        return exchange.currentStream(gpu);
      },
      nb::arg("type"), nb::arg("gpu"),
      "Of the framework with this type of tensors; None without __dlpack_c_exchange_api__.");
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
