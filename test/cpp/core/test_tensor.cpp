// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string_view>

#include "mscclpp_ep/dlpack.hpp"
#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {
namespace {

struct Expected {
  DataType dtype;
  std::string_view name;
  std::size_t bytes;
  int code;  // of DLPack
};

constexpr Expected kExpected[] = {
    {DataType::boolean, "bool", 1, 6},
    {DataType::uint8, "uint8", 1, 1},
    {DataType::int8, "int8", 1, 0},
    {DataType::uint16, "uint16", 2, 1},
    {DataType::int16, "int16", 2, 0},
    {DataType::uint32, "uint32", 4, 1},
    {DataType::int32, "int32", 4, 0},
    {DataType::uint64, "uint64", 8, 1},
    {DataType::int64, "int64", 8, 0},
    {DataType::float16, "float16", 2, 2},
    {DataType::bfloat16, "bfloat16", 2, 4},
    {DataType::float32, "float32", 4, 2},
    {DataType::float64, "float64", 8, 2},
    {DataType::float8E4m3, "float8_e4m3fn", 1, 10},
    {DataType::float8E5m2, "float8_e5m2", 1, 12},
    {DataType::float8E8m0, "float8_e8m0fnu", 1, 14},
    {DataType::float8E4m3Fnuz, "float8_e4m3fnuz", 1, 11},
    {DataType::float8E5m2Fnuz, "float8_e5m2fnuz", 1, 13},
};

TEST_CASE("every type has a size, a name and a DLPack code, there and back") {
  for (const Expected& expected : kExpected) {
    CAPTURE(expected.name);
    CHECK(itemSize(expected.dtype) == expected.bytes);
    CHECK(name(expected.dtype) == expected.name);
    CHECK(static_cast<int>(dlpackCode(expected.dtype)) == expected.code);
    const auto code = static_cast<std::uint8_t>(expected.code);
    const auto bits = static_cast<std::uint8_t>(8 * expected.bytes);
    CHECK(fromDlpackType(code, bits, 1) == expected.dtype);
    CHECK_THROWS_AS(fromDlpackType(code, bits, 2), InvalidArgument);
  }
  CHECK_THROWS_AS(itemSize(static_cast<DataType>(std::size(kExpected))), InvalidArgument);
}

TEST_CASE("a DLPack type that has no DataType is refused with its numbers") {
  CHECK_THROWS_WITH_AS(fromDlpackType(17, 4, 2),
                       "DLPack type code 17 of 4 bits and 2 lanes is not supported: give a bool, "
                       "integer, float16, bfloat16, float32, float64 or float8 (e4m3fn, e5m2, "
                       "e8m0fnu, e4m3fnuz, e5m2fnuz) of one lane, or view the rows as uint8",
                       InvalidArgument);
  CHECK_THROWS_AS(fromDlpackType(2, 8, 1), InvalidArgument);
  CHECK_THROWS_AS(fromDlpackType(5, 64, 1), InvalidArgument);  // complex
}

TEST_CASE("DLPack devices") {
  CHECK(toString(fromDlpackDevice(1, 5)) == "cpu");
  CHECK(fromDlpackDevice(1, 5).index == 0);
  CHECK(toString(fromDlpackDevice(2, 3)) == "cuda:3");
  CHECK(toString(fromDlpackDevice(3, 1)) == "cpu");
  CHECK(toString(fromDlpackDevice(13, 2)) == "cuda:2");
  CHECK_THROWS_WITH_AS(fromDlpackDevice(10, 0),
                       "a tensor is on DLPack device type 10; CPU (1, 3) and CUDA (2, 13) are "
                       "supported",
                       InvalidArgument);
}

TEST_CASE("makeView lays elements in C order") {
  const std::array<float, 24> data{};
  const TensorView view = makeView(data.data(), DataType::float32, {2, 3, 4});
  CHECK(view.data == data.data());
  CHECK(view.ndim == 3);
  CHECK(view.strides == std::array<std::int64_t, kMaxDimensions>{12, 4, 1, 0});
  CHECK(numElements(view) == 24);
  CHECK(numBytes(view) == 96);
  CHECK(isContiguous(view));
  CHECK(static_cast<bool>(view));
  CHECK_FALSE(static_cast<bool>(TensorView{}));
}

TEST_CASE("makeView refuses shapes that cannot be") {
  CHECK_NOTHROW(makeView(nullptr, DataType::uint8, {1, 1, 1, 1}));
  CHECK_THROWS_WITH_AS(makeView(nullptr, DataType::uint8, {1, 2, 3, 4, 5}),
                       "a tensor of shape [1, 2, 3, 4, 5] has more than the allowed 4 dimensions",
                       InvalidArgument);
  CHECK_THROWS_WITH_AS(makeView(nullptr, DataType::uint8, {2, -1}),
                       "the shape [2, -1] of a tensor has a negative extent", InvalidArgument);
  const std::int64_t half = std::numeric_limits<std::int64_t>::max() / 2 + 1;
  CHECK_THROWS_AS(makeView(nullptr, DataType::uint8, {2, half}), InvalidArgument);
  CHECK_THROWS_AS(makeView(nullptr, DataType::uint8, {half, 2}), InvalidArgument);
}

TEST_CASE("isContiguous looks at strides only where they matter") {
  TensorView view = makeView(nullptr, DataType::int32, {4, 3});
  view.strides = {1, 4};
  CHECK_FALSE(isContiguous(view));
  view.strides = {6, 1};
  CHECK_FALSE(isContiguous(view));
  view.shape = {1, 3};
  CHECK(isContiguous(view));
  view.shape = {4, 0};
  CHECK(isContiguous(view));
  CHECK(numElements(view) == 0);
  CHECK(numBytes(view) == 0);
}

TEST_CASE("toString says what a user needs to see") {
  CHECK(toString(Device{}) == "cpu");
  CHECK(toString(Device{DeviceType::cuda, 1}) == "cuda:1");
  CHECK(toString(TensorView{}) == "none");
  CHECK(toString(makeView(nullptr, DataType::bfloat16, {4096, 7168})) ==
        "bfloat16[4096, 7168] on cpu");
  CHECK(toString(makeView(nullptr, DataType::int64, {0}, {DeviceType::cuda, 0})) ==
        "int64[0] on cuda:0");
}

// The fields of DLPack's DLTensor.
struct FakeTensor {
  void* data;
  struct {
    int device_type;
    std::int32_t device_id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

TEST_CASE("fromDlpack takes offset and strides, and C order where there are none") {
  std::array<std::int16_t, 32> data{};
  std::array<std::int64_t, 5> shape{4, 3, 1, 1, 1};
  std::array<std::int64_t, 2> strides{8, 2};
  FakeTensor tensor{data.data(), {1, 0}, 2, {4, 16, 1}, shape.data(), nullptr, 4};
  const TensorView view = fromDlpack(tensor);
  CHECK(view.data == data.data() + 2);
  CHECK(view.dtype == DataType::bfloat16);
  CHECK(toString(view.device) == "cpu");
  CHECK(view.shape == std::array<std::int64_t, kMaxDimensions>{4, 3, 0, 0});
  CHECK(view.strides == std::array<std::int64_t, kMaxDimensions>{3, 1, 0, 0});
  tensor.strides = strides.data();
  CHECK(fromDlpack(tensor).strides == std::array<std::int64_t, kMaxDimensions>{8, 2, 0, 0});
  tensor.ndim = 5;
  CHECK_THROWS_AS(fromDlpack(tensor), InvalidArgument);
}

}  // namespace
}  // namespace mscclpp_ep
