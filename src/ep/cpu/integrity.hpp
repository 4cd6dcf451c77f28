// SPDX-License-Identifier: MIT
// The integrity mode: rows carry a checksum and a tag, which are compared where they arrive.
#ifndef MSCCLPP_EP_CPU_INTEGRITY_HPP_
#define MSCCLPP_EP_CPU_INTEGRITY_HPP_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "core/checksum.hpp"
#include "core/packets.hpp"
#include "cpu/context.hpp"

namespace mscclpp_ep::cpu {

/// The bytes of `count` seals; 0 if the mode is off.
inline std::size_t sealBytes(const Context& context, std::int64_t count) {
  return context.integrity ? arrayBytes(count, sizeof(RowSeal)) : 0;
}

/// Adds a choice, its id and weight, to a checksum.
inline std::uint64_t addChoice(std::uint64_t sum, std::int64_t id, float weight) {
  return extendChecksum(extendChecksum(sum, static_cast<std::uint64_t>(id)),
                        std::bit_cast<std::uint32_t>(weight));
}

/// Compares what has arrived with what was sent.
class RowVerifier {
 public:
  RowVerifier(const Context& context, const char* operation)
      : context_(context), operation_(operation), epoch_(context.epoch) {}

  /// `sum` is the checksum of what is here from rank `source`, for `token`; `seal` came with it.
  /// Any thread may call.
  void check(int source, std::int64_t token, std::uint64_t sum, const RowSeal& seal) const {
    const std::uint64_t tag = packTag(source, token, epoch_);
    if (seal.tag != tag || seal.checksum != sum) note(source, token, sum, seal);
  }

  /// Throws PeerFailure for what differed, the first of it by (source, token).
  void throwIfDamaged() const;

 private:
  void note(int source, std::int64_t token, std::uint64_t sum, const RowSeal& seal) const;

  const Context& context_;
  const char* const operation_;
  const std::uint64_t epoch_;
  mutable std::mutex mutex_;
  mutable std::pair<int, std::int64_t> first_;  ///< source and token of `message_`
  mutable std::string message_;                 ///< empty: nothing differed
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_INTEGRITY_HPP_
