// SPDX-License-Identifier: MIT
#include "mscclpp_ep/tensor.hpp"

#include <algorithm>
#include <array>
#include <span>

#include "core/check.hpp"
#include "mscclpp_ep/dlpack.hpp"

namespace mscclpp_ep {
namespace {

struct TypeFacts {
  DataType dtype;
  const char* name;
  DlpackCode code;
  std::uint8_t bytes;
};

constexpr std::array kTypes{
    TypeFacts{DataType::boolean, "bool", DlpackCode::boolean, 1},
    TypeFacts{DataType::uint8, "uint8", DlpackCode::unsignedInteger, 1},
    TypeFacts{DataType::int8, "int8", DlpackCode::integer, 1},
    TypeFacts{DataType::uint16, "uint16", DlpackCode::unsignedInteger, 2},
    TypeFacts{DataType::int16, "int16", DlpackCode::integer, 2},
    TypeFacts{DataType::uint32, "uint32", DlpackCode::unsignedInteger, 4},
    TypeFacts{DataType::int32, "int32", DlpackCode::integer, 4},
    TypeFacts{DataType::uint64, "uint64", DlpackCode::unsignedInteger, 8},
    TypeFacts{DataType::int64, "int64", DlpackCode::integer, 8},
    TypeFacts{DataType::float16, "float16", DlpackCode::floating, 2},
    TypeFacts{DataType::bfloat16, "bfloat16", DlpackCode::bfloat, 2},
    TypeFacts{DataType::float32, "float32", DlpackCode::floating, 4},
    TypeFacts{DataType::float64, "float64", DlpackCode::floating, 8},
    TypeFacts{DataType::float8E4m3, "float8_e4m3fn", DlpackCode::float8E4m3fn, 1},
    TypeFacts{DataType::float8E5m2, "float8_e5m2", DlpackCode::float8E5m2, 1},
    TypeFacts{DataType::float8E8m0, "float8_e8m0fnu", DlpackCode::float8E8m0fnu, 1},
    TypeFacts{DataType::float8E4m3Fnuz, "float8_e4m3fnuz", DlpackCode::float8E4m3fnuz, 1},
    TypeFacts{DataType::float8E5m2Fnuz, "float8_e5m2fnuz", DlpackCode::float8E5m2fnuz, 1},
};

constexpr bool isIndexedByType() {
  for (std::size_t i = 0; i < kTypes.size(); ++i) {
    if (static_cast<std::size_t>(kTypes[i].dtype) != i) return false;
  }
  return true;
}
static_assert(isIndexedByType());

const TypeFacts& factsOf(DataType dtype) {
  const auto index = static_cast<std::size_t>(dtype);
  EP_EXPECTS(index < kTypes.size(), "a data type has the unknown code ", index);
  return kTypes[index];
}

// Values of DLDeviceType.
constexpr int kDlpackCpu = 1;
constexpr int kDlpackCuda = 2;
constexpr int kDlpackCudaHost = 3;
constexpr int kDlpackCudaManaged = 13;

}  // namespace

std::size_t itemSize(DataType dtype) { return factsOf(dtype).bytes; }

const char* name(DataType dtype) { return factsOf(dtype).name; }

std::string toString(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : cat("cuda:", device.index);
}

TensorView makeView(const void* data, DataType dtype, std::initializer_list<std::int64_t> shape,
                    Device device) {
  EP_EXPECTS(shape.size() <= kMaxDimensions, "a tensor of shape [", shape,
             "] has more than the allowed ", kMaxDimensions, " dimensions");
  EP_EXPECTS(std::ranges::all_of(shape, [](std::int64_t extent) { return extent >= 0; }),
             "the shape [", shape, "] of a tensor has a negative extent");
  TensorView view;
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.ndim = static_cast<int>(shape.size());
  view.device = device;
  std::ranges::copy(shape, view.shape.begin());
  std::int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.strides[i] = stride;
    EP_EXPECTS(!__builtin_mul_overflow(stride, view.shape[i], &stride), "a tensor of shape [",
               shape, "] has more elements than fit in 63 bits");
  }
  return view;
}

std::int64_t numElements(const TensorView& tensor) {
  std::int64_t elements = 1;
  for (int i = 0; i < tensor.ndim; ++i) elements *= tensor.shape[i];
  return elements;
}

std::size_t numBytes(const TensorView& tensor) {
  return static_cast<std::size_t>(numElements(tensor)) * itemSize(tensor.dtype);
}

bool isContiguous(const TensorView& tensor) {
  if (numElements(tensor) == 0) return true;
  std::int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

std::string toString(const TensorView& tensor) {
  if (!tensor) return "none";
  const std::span extents(tensor.shape.data(), static_cast<std::size_t>(tensor.ndim));
  return cat(tensor.dtype, "[", extents, "] on ", tensor.device);
}

DataType fromDlpackType(std::uint8_t code, std::uint8_t bits, std::uint16_t lanes) {
  const auto matches = [&](const TypeFacts& facts) {
    return static_cast<std::uint8_t>(facts.code) == code && facts.bytes * 8 == bits && lanes == 1;
  };
  const auto found = std::ranges::find_if(kTypes, matches);
  EP_EXPECTS(found != kTypes.end(), "DLPack type code ", code, " of ", bits, " bits and ", lanes,
             " lanes is not supported: give a bool, integer, float16, bfloat16, float32, float64 "
             "or float8 (e4m3fn, e5m2, e8m0fnu, e4m3fnuz, e5m2fnuz) of one lane, or view the "
             "rows as uint8");
  return found->dtype;
}

DlpackCode dlpackCode(DataType dtype) { return factsOf(dtype).code; }

Device fromDlpackDevice(int type, int index) {
  switch (type) {
    case kDlpackCpu:
    case kDlpackCudaHost:  // pinned
      return {DeviceType::cpu, 0};
    case kDlpackCuda:
    case kDlpackCudaManaged:
      return {DeviceType::cuda, index};
    default:
      throw InvalidArgument(cat("a tensor is on DLPack device type ", type,
                                "; CPU (1, 3) and CUDA (2, 13) are supported"));
  }
}

}  // namespace mscclpp_ep
