// SPDX-License-Identifier: MIT
// Whether the ranks of one operation do the same thing.
#ifndef MSCCLPP_EP_CORE_AGREEMENT_HPP_
#define MSCCLPP_EP_CORE_AGREEMENT_HPP_

#include <cstdint>
#include <exception>
#include <span>
#include <string_view>
#include <utility>

#include "core/packets.hpp"
#include "mscclpp_ep/buffer.hpp"

namespace mscclpp_ep {

/// Thrown when an operation ends in an error that every rank sees alike, so that the buffer is
/// still usable; any other exception ends the buffer.
struct OperationRefused : std::exception {
  explicit OperationRefused(std::exception_ptr reason) : error(std::move(reason)) {}

  std::exception_ptr error;
};

/// The beginning of every entry.
struct EntryHead {
  Signature signature;
  Status status;
  std::uint64_t gpuEpoch = 0;  ///< HostContext::gpuEpoch
};

const char* name(Operation operation);

/// A status that refuses, with as much of the reason as fits.
Status refusal(Verdict verdict, std::string_view why);

/// The reason, which a peer wrote: it may lack its end.
std::string_view reasonOf(const Status& status);

/// Throws OperationRefused with a PeerFailure if a rank refused, naming it and its reason.
void requireAll(std::span<const Status> statuses, const char* operation);

/// Throws OperationRefused with an InvalidArgument if signatures differ, naming in what and who.
void requireAgreement(std::span<const Signature> signatures);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_AGREEMENT_HPP_
