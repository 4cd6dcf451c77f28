// SPDX-License-Identifier: MIT
#include "core/check_tensor.hpp"

#include <limits>
#include <string>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

bool dtypeAllowed(const Expected& expected, DataType dtype) {
  if (expected.dtypes.size() == 0) return true;
  for (const DataType allowed : expected.dtypes) {
    if (allowed == dtype) return true;
  }
  return false;
}

std::string listOf(std::initializer_list<DataType> dtypes) {
  std::string text;
  for (const DataType dtype : dtypes) text += (text.empty() ? "" : ", ") + std::string(name(dtype));
  return text;
}

std::string shapeOf(std::initializer_list<std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += extent == kAnyExtent ? "any" : std::to_string(extent);
  }
  return text + "]";
}

bool shapeFits(const Expected& expected, const TensorView& tensor) {
  if (tensor.ndim != static_cast<int>(expected.shape.size())) return false;
  const std::int64_t* extent = expected.shape.begin();
  for (int i = 0; i < tensor.ndim; ++i, ++extent) {
    if (*extent != kAnyExtent && *extent != tensor.shape[static_cast<std::size_t>(i)]) return false;
  }
  return true;
}

}  // namespace

void checkTensor(const TensorView& tensor, const Device& device, const Expected& expected) {
  EP_EXPECTS(tensor, expected.name, " is missing; it must be ", expected.shapeText);
  EP_EXPECTS(tensor.device == device, expected.name, " is ", toString(tensor),
             "; this buffer takes tensors on ", toString(device));
  EP_EXPECTS(dtypeAllowed(expected, tensor.dtype), expected.name, " is ", toString(tensor),
             "; its dtype must be one of: ", listOf(expected.dtypes));
  EP_EXPECTS(shapeFits(expected, tensor), expected.name, " is ", toString(tensor),
             "; its shape must be ", shapeOf(expected.shape), ", that is ", expected.shapeText);
  EP_EXPECTS(!expected.contiguous || isContiguous(tensor), expected.name, " is ", toString(tensor),
             " with gaps or in another order; it must be contiguous (C order)");
  EP_EXPECTS(tensor.data != nullptr || numElements(tensor) == 0, expected.name, " is ",
             toString(tensor), " without memory");
}

void checkAbsent(const TensorView& tensor, const char* name, const char* why) {
  EP_EXPECTS(!tensor, name, " is ", toString(tensor), "; it must be left out ", why);
}

void checkTopkIdx(const TensorView& topkIdx, const BufferFacts& facts, std::int64_t numTokens) {
  checkTensor(topkIdx, facts.options.device,
              {"topk_idx", {DataType::int32, DataType::int64}, {numTokens, kAnyExtent}, "[T, K]"});
}

void checkNumExperts(const BufferFacts& facts, std::int64_t numExperts) {
  EP_EXPECTS(numExperts > 0, "num_experts is ", numExperts, "; it must be at least 1");
  EP_EXPECTS(numExperts <= std::numeric_limits<std::int32_t>::max(), "num_experts is ", numExperts,
             "; it must be below 2^31");
  const auto mapped = static_cast<std::int64_t>(facts.options.expertMap.size());
  EP_EXPECTS(mapped == 0 || mapped == numExperts, "num_experts is ", numExperts,
             ", but this buffer's expert_map places ", mapped, " experts");
}

}  // namespace mscclpp_ep
