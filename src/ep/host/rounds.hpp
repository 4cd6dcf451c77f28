// SPDX-License-Identifier: MIT
// Rounds of messages that begin every operation, and what they carry.
#ifndef MSCCLPP_EP_HOST_ROUNDS_HPP_
#define MSCCLPP_EP_HOST_ROUNDS_HPP_

#include <cstring>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "core/agreement.hpp"
#include "core/check.hpp"
#include "host/context.hpp"

namespace mscclpp_ep {

/// The bytes of a record, with `extra` behind it.
template <typename Record>
Message encode(const Record& record, std::span<const std::int32_t> extra = {}) {
  Message message(sizeof(record) + extra.size_bytes());
  std::memcpy(message.data(), &record, sizeof(record));
  if (!extra.empty())
    std::memcpy(message.data() + sizeof(record), extra.data(), extra.size_bytes());
  return message;
}

/// The record at the beginning of a message, which a peer wrote: it may be too short.
template <typename Record>
Record decode(const Message& message) {
  if (message.size() < sizeof(Record)) throw PeerFailure("a rank sent a malformed message");
  Record record;
  std::memcpy(&record, message.data(), sizeof(record));
  return record;
}

struct RowRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// Rows of an array whose address a peer wrote, of elements of `alignment` bytes. Throws
/// PeerFailure if the peer has no such memory.
std::byte* peerRows(const HostContext& context, int peer, const ArrayAddress& address,
                    const RowRange& rows, std::size_t rowBytes, std::size_t alignment);

/// Exchanges the entries of an operation, each of which begins with an EntryHead, and returns those
/// of all ranks. Throws OperationRefused unless every rank takes part in the same operation.
const std::vector<Message>& exchangeEntries(HostContext& context,
                                            const std::vector<Message>& outgoing);

/// Throws OperationRefused unless every rank takes part in the same operation, as these entries of
/// all ranks say.
void requireEntries(const HostContext& context, const std::vector<Message>& entries);

/// Exchanges where rows go: records that begin with a Status. Returns those of all ranks, that of a
/// masked one empty. `meanwhile`, if given, is done while those of others are on their way. Throws
/// OperationRefused if a rank says that it cannot take its rows.
const std::vector<Message>& exchangePublications(HostContext& context,
                                                 const std::vector<Message>& outgoing,
                                                 const char* operation,
                                                 const std::function<void()>& meanwhile = {});

/// What a rank has published of where rows go. Throws PeerFailure if there can be no such rows.
DispatchPublish decodePublish(const Message& message, std::size_t rank);

/// Takes part in an operation by refusing it.
void postRefusal(HostContext& context, Operation operation, std::string_view why);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_ROUNDS_HPP_
