// SPDX-License-Identifier: MIT
// Every check of an argument and its message. They throw InvalidArgument (NotBuilt where a feature
// is missing), and touch nothing but what they are given.
#ifndef MSCCLPP_EP_CORE_VALIDATE_HPP_
#define MSCCLPP_EP_CORE_VALIDATE_HPP_

#include <cstdint>

#include "core/backend.hpp"

namespace mscclpp_ep {

/// What arguments are checked against.
struct BufferFacts {
  int rank = 0;
  int numRanks = 1;
  std::uint64_t bufferId = 0;
  const BufferOptions& options;
};

/// One of this buffer's.
const HandleState& checkHandle(const BufferFacts& facts, const DispatchHandle& handle);

void validateOptions(const BufferOptions& options, int numRanks);

/// A stream that the buffer's device takes.
void validateCall(const BufferFacts& facts, const CallOptions& call);

void validateLayout(const BufferFacts& facts, const TensorView& topkIdx, std::int64_t numExperts,
                    const LayoutOutputs& outputs);

/// `placement`, `routing` and `call` are not filled in yet.
DispatchRequest validateDispatch(const BufferFacts& facts, const DispatchInputs& inputs,
                                 const DispatchOptions& options);
DispatchRequest validateCachedDispatch(const BufferFacts& facts, const DispatchInputs& inputs,
                                       const DispatchHandle& handle);
void validateDispatchOutputs(const PendingState& pending, const DispatchOutputs& outputs);

CombineRequest validateCombine(const BufferFacts& facts, const CombineInputs& inputs,
                               const DispatchHandle& handle, const CombineOutputs& outputs);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_VALIDATE_HPP_
