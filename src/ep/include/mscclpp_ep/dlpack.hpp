// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_DLPACK_HPP_
#define MSCCLPP_EP_DLPACK_HPP_

#include <cstddef>
#include <cstdint>
#include <string>

#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {

/// DLPack's codes, of which not every version of dlpack.h has all.
enum class DlpackCode : std::uint8_t {
  integer = 0,
  unsignedInteger = 1,
  floating = 2,
  bfloat = 4,
  boolean = 6,
  float8E4m3fn = 10,
  float8E4m3fnuz = 11,
  float8E5m2 = 12,
  float8E5m2fnuz = 13,
  float8E8m0fnu = 14,
};

/// The DataType of a DLPack type of one lane. Throws InvalidArgument for one that has none.
MSCCLPP_EP_API DataType fromDlpackType(std::uint8_t code, std::uint8_t bits, std::uint16_t lanes);
/// DLPack's code of a DataType.
MSCCLPP_EP_API DlpackCode dlpackCode(DataType dtype);
/// The Device of a DLPack device. Throws InvalidArgument for one that is neither CPU nor CUDA.
MSCCLPP_EP_API Device fromDlpackDevice(int type, int index);

/// A view of a `DLTensor`: dmlc's, or anything with the same fields, so that this header needs
/// none of it. Null strides mean C order.
template <typename DLTensorLike>
TensorView fromDlpack(const DLTensorLike& tensor) {
  if (tensor.ndim < 1 || tensor.ndim > kMaxDimensions) {
    throw InvalidArgument("a tensor of " + std::to_string(tensor.ndim) +
                          " dimensions was given; 1 to 4 are allowed");
  }
  TensorView view;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view.dtype = fromDlpackType(tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes);
  view.ndim = static_cast<int>(tensor.ndim);
  view.device = fromDlpackDevice(static_cast<int>(tensor.device.device_type),
                                 static_cast<int>(tensor.device.device_id));
  std::int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    const auto axis = static_cast<std::size_t>(i);
    view.shape[axis] = tensor.shape[i];
    view.strides[axis] = tensor.strides != nullptr ? tensor.strides[i] : stride;
    stride *= tensor.shape[i];
  }
  return view;
}

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_DLPACK_HPP_
