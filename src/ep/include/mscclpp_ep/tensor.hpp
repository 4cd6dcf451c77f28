// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TENSOR_HPP_
#define MSCCLPP_EP_TENSOR_HPP_

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "mscclpp_ep/export.hpp"

namespace mscclpp_ep {

/// Element types. Types narrower than a byte (FP4) travel as rows of `uint8`.
enum class DataType : std::uint8_t {
  boolean,
  uint8,
  int8,
  uint16,
  int16,
  uint32,
  int32,
  uint64,
  int64,
  float16,
  bfloat16,
  float32,
  float64,
  float8E4m3,      ///< OCP e4m3, finite only ("e4m3fn")
  float8E5m2,      ///< OCP e5m2
  float8E8m0,      ///< OCP e8m0 scale ("UE8M0")
  float8E4m3Fnuz,  ///< e4m3 without infinities and negative zero
  float8E5m2Fnuz,
};

/// Bytes of one element.
MSCCLPP_EP_API std::size_t itemSize(DataType dtype);

/// The name users know, such as "bfloat16" or "float8_e4m3fn".
MSCCLPP_EP_API const char* name(DataType dtype);

enum class DeviceType : std::uint8_t { cpu, cuda };

/// Where the bytes of a tensor are. `index` is the ordinal of a GPU, and 0 for the CPU.
struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

/// "cpu", "cuda:1".
MSCCLPP_EP_API std::string toString(Device device);

inline constexpr int kMaxDimensions = 4;

/// A strided view of memory that somebody else owns. Inputs are never written to, although `data`
/// is not const. A default-made view has no dimensions and means "not given".
struct TensorView {
  void* data = nullptr;
  DataType dtype = DataType::uint8;
  int ndim = 0;
  std::array<std::int64_t, kMaxDimensions> shape{};
  std::array<std::int64_t, kMaxDimensions> strides{};  ///< in elements
  Device device;

  /// Whether a tensor was given at all; one with zero elements was.
  explicit operator bool() const { return ndim > 0; }
};

/// A view of `data` in C order. Throws InvalidArgument for more than kMaxDimensions dimensions.
MSCCLPP_EP_API TensorView makeView(const void* data, DataType dtype,
                                   std::initializer_list<std::int64_t> shape, Device device = {});

/// Product of the extents; 1 for a view without dimensions.
MSCCLPP_EP_API std::int64_t numElements(const TensorView& tensor);

/// Elements times their size.
MSCCLPP_EP_API std::size_t numBytes(const TensorView& tensor);

/// Whether the elements lie in C order without gaps; strides of extents of 1 do not matter.
MSCCLPP_EP_API bool isContiguous(const TensorView& tensor);

/// "bfloat16[4096, 7168] on cpu", or "none".
MSCCLPP_EP_API std::string toString(const TensorView& tensor);

/// A view and what keeps its bytes alive. Copies share the memory, which goes back to the buffer
/// that it came from when the last copy dies; it may outlive the buffer.
struct Tensor {
  TensorView view;
  std::shared_ptr<void> owner;
  bool inArena = false;  ///< peers reach it: rows arrive in it, and are read from it, in place
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TENSOR_HPP_
