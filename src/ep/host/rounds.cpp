// SPDX-License-Identifier: MIT
#include "host/rounds.hpp"

#include <algorithm>
#include <limits>

namespace mscclpp_ep {

namespace {

/// A rank that refuses may leave at once. What it said explains more than that it is gone.
void throwRefusalOfOneGone(const HostContext& context) {
  for (int rank = 0; rank < context.size(); ++rank) {
    const Message* entry = context.mailbox.received(rank);
    if (entry == nullptr) continue;
    const auto head = decode<EntryHead>(*entry);
    if (head.status.verdict == Verdict::go) continue;
    throw PeerFailure(
        cat("rank ", rank, " refused the operation, and a rank left: ", reasonOf(head.status)));
  }
}

}  // namespace

std::byte* peerRows(const HostContext& context, int peer, const ArrayAddress& address,
                    const RowRange& rows, std::size_t rowBytes, std::size_t alignment) {
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  const bool sound =
      rows.first >= 0 && rows.count >= 0 &&
      !__builtin_mul_overflow(static_cast<std::uint64_t>(rows.first), rowBytes, &offset) &&
      !__builtin_add_overflow(offset, address.offset, &offset) &&
      !__builtin_mul_overflow(static_cast<std::size_t>(rows.count), rowBytes, &bytes) &&
      offset % alignment == 0;
  if (!sound) {
    throw PeerFailure(cat("rank ", peer, " published ", rows.count, " rows of ", rowBytes,
                          " bytes at ", address.offset, ", where no such rows can be"));
  }
  return context.transport.peerMemory(peer, address.segment, offset, bytes);
}

const std::vector<Message>& exchangeEntries(HostContext& context,
                                            const std::vector<Message>& outgoing) {
  const TraceScope scope(context.trace, "entry");
  const auto exchange = [&]() -> const std::vector<Message>& {
    try {
      return context.mailbox.exchange(context.epoch, static_cast<std::uint32_t>(Round::entry),
                                      outgoing, "the entry into the operation");
    } catch (const PeerFailure&) {
      throwRefusalOfOneGone(context);
      throw;
    }
  };
  const auto& entries = exchange();
  requireEntries(context, entries);
  for (const Message& entry : entries) {
    if (entry.empty()) continue;
    context.gpuEpoch = std::max(context.gpuEpoch, decode<EntryHead>(entry).gpuEpoch);
  }
  return entries;
}

void requireEntries(const HostContext& context, const std::vector<Message>& entries) {
  std::vector<Status> statuses;
  std::vector<Signature> signatures;
  const auto self = static_cast<std::size_t>(context.rank());
  const auto own = decode<EntryHead>(entries[self]);
  for (int rank = 0; rank < context.size(); ++rank) {
    // A masked rank has nothing against it, and agrees.
    const auto head = context.masked(rank)
                          ? EntryHead{own.signature, {}}
                          : decode<EntryHead>(entries[static_cast<std::size_t>(rank)]);
    statuses.push_back(head.status);
    signatures.push_back(head.signature);
  }
  requireAll(statuses, name(static_cast<Operation>(own.signature.operation)));
  requireAgreement(signatures);
}

const std::vector<Message>& exchangePublications(HostContext& context,
                                                 const std::vector<Message>& outgoing,
                                                 const char* operation,
                                                 const std::function<void()>& meanwhile) {
  constexpr auto kRound = static_cast<std::uint32_t>(Round::publish);
  constexpr const char* kWhat = "where rows go";
  context.mailbox.post(context.epoch, kRound, outgoing, kWhat);
  if (meanwhile) meanwhile();
  const auto& published = context.mailbox.collect(context.epoch, kRound, kWhat);
  std::vector<Status> statuses;
  statuses.reserve(published.size());
  for (const Message& message : published) {
    statuses.push_back(message.empty() ? Status{} : decode<Status>(message));
  }
  requireAll(statuses, operation);
  return published;
}

DispatchPublish decodePublish(const Message& message, std::size_t rank) {
  const auto publication = decode<DispatchPublish>(message);
  if (publication.capacity < 0 || publication.firstRow < 0 ||
      publication.firstRow > std::numeric_limits<std::int32_t>::max()) {
    throw PeerFailure(
        cat("rank ", rank, " published row ", publication.firstRow, " of ", publication.capacity));
  }
  return publication;
}

void postRefusal(HostContext& context, Operation operation, std::string_view why) {
  EntryHead head;
  head.signature.operation = static_cast<std::uint32_t>(operation);
  head.status = refusal(Verdict::rejected, why);
  const std::vector<Message> outgoing(static_cast<std::size_t>(context.size()), encode(head));
  context.mailbox.post(context.epoch, static_cast<std::uint32_t>(Round::entry), outgoing,
                       "room for a message");
}

}  // namespace mscclpp_ep
