// SPDX-License-Identifier: MIT
// The checks of low-latency operations, as those of validate.hpp.
#ifndef MSCCLPP_EP_CORE_VALIDATE_LOW_LATENCY_HPP_
#define MSCCLPP_EP_CORE_VALIDATE_LOW_LATENCY_HPP_

#include "core/backend.hpp"
#include "core/validate.hpp"

namespace mscclpp_ep {

/// All but `placement` and `call` are filled in.
LowLatencyDispatchRequest validateLowLatencyDispatch(const BufferFacts& facts,
                                                     const LowLatencyDispatchInputs& inputs,
                                                     const LowLatencyDispatchOptions& options,
                                                     const LowLatencyDispatchOutputs& outputs);

/// All but `call` is filled in.
LowLatencyCombineRequest validateLowLatencyCombine(const BufferFacts& facts,
                                                   const LowLatencyCombineInputs& inputs,
                                                   const LowLatencyHandle& handle,
                                                   const LowLatencyCombineOptions& options,
                                                   const LowLatencyCombineOutputs& outputs);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_VALIDATE_LOW_LATENCY_HPP_
