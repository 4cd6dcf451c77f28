// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>

#include <cstring>

#include "bind.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::python {

namespace nb = nanobind;

namespace {

/// The Python classes, made once and kept as long as the process.
struct ErrorTypes {
  PyObject* error;
  PyObject* invalidArgument;
  PyObject* timeout;
  PyObject* peerFailure;
  PyObject* cudaError;
  PyObject* systemError;
  PyObject* notBuilt;
};
ErrorTypes types;

PyObject* makeType(nb::module_& m, const char* name, const char* doc, const nb::object& bases) {
  const std::string qualified = std::string("mscclpp_ep.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr);
  if (type == nullptr) throw nb::python_error();
  m.attr(name) = nb::borrow(type);
  return type;
}

nb::object both(PyObject* first, PyObject* second) {
  return nb::make_tuple(nb::borrow(first), nb::borrow(second));
}

PyObject* typeOf(const Error& error) {
  if (dynamic_cast<const InvalidArgument*>(&error) != nullptr) return types.invalidArgument;
  if (dynamic_cast<const Timeout*>(&error) != nullptr) return types.timeout;
  if (dynamic_cast<const PeerFailure*>(&error) != nullptr) return types.peerFailure;
  if (dynamic_cast<const CudaError*>(&error) != nullptr) return types.cudaError;
  if (dynamic_cast<const SystemError*>(&error) != nullptr) return types.systemError;
  if (dynamic_cast<const NotBuilt*>(&error) != nullptr) return types.notBuilt;
  return types.error;
}

}  // namespace

void bindErrors(nb::module_& m) {
  types.error =
      makeType(m, "Error", "Base of every error of mscclpp_ep.", nb::borrow(PyExc_RuntimeError));
  types.invalidArgument =
      makeType(m, "InvalidArgument",
               "An argument was refused. Nothing was sent; the buffer is still usable.",
               both(types.error, PyExc_ValueError));
  types.timeout = makeType(m, "Timeout",
                           "A wait lasted longer than `timeout`. The buffer can only be destroyed.",
                           both(types.error, PyExc_TimeoutError));
  types.peerFailure =
      makeType(m, "PeerFailure", "Another rank refused its arguments, gave up, or died.",
               nb::borrow(types.error));
  types.cudaError = makeType(m, "CudaError", "A call of the CUDA runtime or driver failed.",
                             nb::borrow(types.error));
  types.systemError =
      makeType(m, "SystemError", "The operating system refused memory, a descriptor or a socket.",
               nb::borrow(types.error));
  types.notBuilt = makeType(m, "NotBuilt", "The feature is not in this build or version.",
                            nb::borrow(types.error));
  nb::register_exception_translator([](const std::exception_ptr& exception, void*) {
    try {
      std::rethrow_exception(exception);
    } catch (const Error& error) {
      // A message may quote bytes that are no UTF-8.
      const auto text = nb::steal(PyUnicode_DecodeUTF8(
          error.what(), static_cast<Py_ssize_t>(std::strlen(error.what())), "replace"));
      PyErr_SetObject(typeOf(error), text.ptr());
    }
  });
}

}  // namespace mscclpp_ep::python
