// SPDX-License-Identifier: MIT
// Checks that more than one kind of operation needs.
#ifndef MSCCLPP_EP_CORE_CHECK_TENSOR_HPP_
#define MSCCLPP_EP_CORE_CHECK_TENSOR_HPP_

#include <cstdint>
#include <initializer_list>

#include "core/validate.hpp"

namespace mscclpp_ep {

inline constexpr std::int64_t kAnyExtent = -1;

/// What an argument must be, for the check and for the message alike.
struct Expected {
  const char* name;
  std::initializer_list<DataType> dtypes;  ///< empty: any
  std::initializer_list<std::int64_t> shape;
  const char* shapeText;
  bool contiguous = true;
};

void checkTensor(const TensorView& tensor, const Device& device, const Expected& expected);
void checkAbsent(const TensorView& tensor, const char* name, const char* why);
/// The dtype and the shape. `numTokens` may be kAnyExtent.
void checkTopkIdx(const TensorView& topkIdx, const BufferFacts& facts, std::int64_t numTokens);
void checkNumExperts(const BufferFacts& facts, std::int64_t numExperts);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_CHECK_TENSOR_HPP_
