// SPDX-License-Identifier: MIT
#include "array.hpp"

#include <cstring>

#include "exchange.hpp"
#include "mscclpp_ep/dlpack.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::python {

namespace {

TensorView viewOf(const nb::ndarray<nb::ro>& array) {
  const nb::dlpack::dtype dtype = array.dtype();
  if (array.ndim() < 1 || array.ndim() > kMaxDimensions) {
    throw InvalidArgument("a tensor of " + std::to_string(array.ndim()) +
                          " dimensions was given; 1 to 4 are allowed");
  }
  TensorView view;
  view.data = const_cast<void*>(array.data());
  view.dtype = fromDlpackType(dtype.code, dtype.bits, dtype.lanes);
  view.ndim = static_cast<int>(array.ndim());
  view.device = fromDlpackDevice(array.device_type(), array.device_id());
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    view.shape[i] = static_cast<std::int64_t>(array.shape(i));
    view.strides[i] = array.stride(i);
  }
  return view;
}

template <typename Framework>
nb::object exportTo(const Tensor& tensor, nb::dlpack::dtype dtype) {
  // The capsule holds one more reference to the memory, for as long as the framework wants it.
  auto* owner = new std::shared_ptr<void>(tensor.owner);
  nb::capsule capsule(owner,
                      [](void* p) noexcept { delete static_cast<std::shared_ptr<void>*>(p); });
  std::size_t shape[kMaxDimensions] = {};
  std::int64_t strides[kMaxDimensions] = {};
  for (std::size_t i = 0; i < static_cast<std::size_t>(tensor.view.ndim); ++i) {
    shape[i] = static_cast<std::size_t>(tensor.view.shape[i]);
    strides[i] = tensor.view.strides[i];
  }
  const bool onGpu = tensor.view.device.type == DeviceType::cuda;
  nb::ndarray<Framework> array(
      tensor.view.data, static_cast<std::size_t>(tensor.view.ndim), shape, capsule, strides, dtype,
      onGpu ? nb::device::cuda::value : nb::device::cpu::value, tensor.view.device.index);
  return nb::cast(array, nb::rv_policy::reference);
}

nb::dlpack::dtype dlpackType(DataType dtype) {
  return {static_cast<std::uint8_t>(dlpackCode(dtype)),
          static_cast<std::uint8_t>(itemSize(dtype) * 8), 1};
}

nb::dlpack::dtype numpyType(DataType dtype) {
  const DlpackCode code = dlpackCode(dtype);
  const bool known = code == DlpackCode::integer || code == DlpackCode::unsignedInteger ||
                     code == DlpackCode::floating || code == DlpackCode::boolean;
  nb::dlpack::dtype type = dlpackType(dtype);
  if (!known) type.code = static_cast<std::uint8_t>(DlpackCode::unsignedInteger);
  return type;
}

}  // namespace

View importArray(nb::handle object, std::optional<DataType> dtype) {
  View result;
  if (const Exchange exchange(object.type()); exchange) {
    result.owner = nb::borrow(object);
    result.view = exchange.view(object);
  } else if (nb::try_cast(object, result.array)) {
    result.view = viewOf(result.array);
  } else {
    throw InvalidArgument(
        std::string("a ") + nb::type_name(object.type()).c_str() +
        " was given; a tensor with DLPack is needed (NumPy, Torch, JAX, CuPy, …)");
  }
  if (dtype) {
    if (itemSize(*dtype) != itemSize(result.view.dtype)) {
      throw InvalidArgument(std::string("elements of ") + name(*dtype) + " cannot be passed as " +
                            name(result.view.dtype));
    }
    result.view.dtype = *dtype;
  }
  return result;
}

Views importArrays(const nb::sequence& arrays) {
  Views views;
  views.all.reserve(nb::len(arrays));
  for (const nb::handle array : arrays) {
    if (array.is_none()) {
      views.all.emplace_back();
    } else if (nb::isinstance<View>(array)) {
      views.all.push_back(nb::cast<const View&>(array));
    } else {
      views.all.push_back(importArray(array, std::nullopt));
    }
  }
  return views;
}

nb::object exportTensor(const Tensor& tensor, const char* framework) {
  if (std::strcmp(framework, "numpy") == 0) {
    return exportTo<nb::numpy>(tensor, numpyType(tensor.view.dtype));
  }
  if (std::strcmp(framework, "torch") == 0) {
    return exportTo<nb::pytorch>(tensor, dlpackType(tensor.view.dtype));
  }
  return exportTo<nb::array_api>(tensor, dlpackType(tensor.view.dtype));
}

nb::object exportAs(const Tensor& tensor, nb::handle type) {
  const Exchange exchange(type);
  return exchange ? exchange.make(tensor) : nb::none();
}

}  // namespace mscclpp_ep::python
