// SPDX-License-Identifier: MIT
// Tensors of any framework, in and out.
#ifndef MSCCLPP_EP_PYTHON_ARRAY_HPP_
#define MSCCLPP_EP_PYTHON_ARRAY_HPP_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <vector>

#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep::python {

namespace nb = nanobind;

/// A tensor of the caller's and the view of it; one of the first two keeps the tensor alive.
struct View {
  nb::ndarray<nb::ro> array;
  nb::object owner;
  TensorView view;
};

/// Imports an object by DLPack. `dtype` overrides what DLPack says, for types that the framework
/// cannot export and passes as integers of the same size. Throws InvalidArgument.
View importArray(nb::handle object, std::optional<DataType> dtype);

/// The tensors of a call, in an order that it knows; those left out have views of no dimensions.
struct Views {
  std::vector<View> all;

  const TensorView& operator[](std::size_t i) const { return all.at(i).view; }
};

/// Imports a sequence of tensors, of which some may have been imported before, or be None.
Views importArrays(const nb::sequence& arrays);

/// Exports to "numpy", "torch" or "dlpack" (any framework with from_dlpack). NumPy gets types that
/// it does not know as integers of the same size.
nb::object exportTensor(const Tensor& tensor, const char* framework);
/// Exports as a type of tensors that has DLPack's functions of C; None if it has not.
nb::object exportAs(const Tensor& tensor, nb::handle type);

}  // namespace mscclpp_ep::python

#endif  // MSCCLPP_EP_PYTHON_ARRAY_HPP_
