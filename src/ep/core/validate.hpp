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
  TensorReader* reader = nullptr;  ///< null: tensors are read in place

  std::shared_ptr<const void> read(const TensorView& tensor) const {
    return reader != nullptr ? reader->read(tensor) : TensorReader().read(tensor);
  }
};

void validateOptions(const BufferOptions& options, int numRanks);

/// A stream that the buffer's device takes.
void validateCall(const BufferFacts& facts, const CallOptions& call);

void validateLayout(const BufferFacts& facts, const TensorView& topkIdx, std::int64_t numExperts,
                    const LayoutOutputs& outputs);

/// `placement` and `call` are not filled in yet; validateExpertCounts() follows when they are.
DispatchRequest validateDispatch(const BufferFacts& facts, const DispatchInputs& inputs,
                                 const DispatchOptions& options);
DispatchRequest validateCachedDispatch(const BufferFacts& facts, const DispatchInputs& inputs,
                                       const DispatchHandle& handle);
/// Counts per expert are those of the choices of the tokens that go to the expert's rank.
void validateExpertCounts(const DispatchRequest& request);
void validateDispatchOutputs(const PendingState& pending, const DispatchOutputs& outputs);

CombineRequest validateCombine(const BufferFacts& facts, const CombineInputs& inputs,
                               const DispatchHandle& handle, const CombineOutputs& outputs);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_VALIDATE_HPP_
