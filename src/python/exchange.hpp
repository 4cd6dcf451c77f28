// SPDX-License-Identifier: MIT
// Tensors of frameworks that offer DLPack's functions of C for it (`__dlpack_c_exchange_api__`,
// DLPack 1.3): they take a tenth of the time that the methods of Python take.
#ifndef MSCCLPP_EP_PYTHON_EXCHANGE_HPP_
#define MSCCLPP_EP_PYTHON_EXCHANGE_HPP_

#include <nanobind/nanobind.h>

#include <cstdint>

#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep::python {

namespace nb = nanobind;

/// DLPack's table of functions, in its layout.
struct ExchangeTable;

/// How tensors of one type pass. None of it waits for or orders streams. Whatever a framework
/// raises is thrown as nb::python_error.
class Exchange {
 public:
  /// Of a type; one that has no such functions, or none of a version that is known, gives false.
  explicit Exchange(nb::handle type);
  explicit operator bool() const { return table_ != nullptr; }

  /// A view of a tensor of the type, which must be kept. Throws InvalidArgument if it is of a kind
  /// that the library does not have.
  TensorView view(nb::handle tensor) const;
  /// A tensor of the type over the memory of a buffer.
  nb::object make(const Tensor& tensor) const;
  /// The framework's current stream on a GPU.
  std::uintptr_t currentStream(int gpu) const;

 private:
  const ExchangeTable* table_ = nullptr;
};

}  // namespace mscclpp_ep::python

#endif  // MSCCLPP_EP_PYTHON_EXCHANGE_HPP_
