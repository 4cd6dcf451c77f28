// SPDX-License-Identifier: MIT
#include "cpu/integrity.hpp"

#include <charconv>

#include "core/check.hpp"

namespace mscclpp_ep::cpu {

namespace {

std::string hex(std::uint64_t value) {
  char digits[16];
  const auto end = std::to_chars(std::begin(digits), std::end(digits), value, 16).ptr;
  return "0x" + std::string(std::begin(digits), end);
}

std::string describeTag(std::uint64_t tag) {
  return cat("rank ", tagRank(tag), ", token ", tagToken(tag), ", epoch ", tagEpoch(tag));
}

}  // namespace

void RowVerifier::note(int source, std::int64_t token, std::uint64_t sum,
                       const RowSeal& seal) const {
  const std::lock_guard lock(mutex_);
  const std::pair<int, std::int64_t> which(source, token);
  if (!message_.empty() && first_ <= which) return;
  first_ = which;
  const std::uint64_t tag = packTag(source, token, epoch_);
  const std::string difference = seal.tag != tag
                                     ? cat("its tag (epochs modulo 65536) is of ",
                                           describeTag(seal.tag), " instead of ", describeTag(tag))
                                     : cat("its checksum was ", hex(seal.checksum),
                                           " when it was sent, and is now ", hex(sum));
  message_ = cat(operation_, " (epoch ", epoch_, ") on rank ", context_.rank(),
                 ": the integrity check failed for what rank ", source, " sent for token ", token,
                 ": ", difference);
}

void RowVerifier::throwIfDamaged() const {
  const std::lock_guard lock(mutex_);
  if (message_.empty()) return;
  // A rank that gave up may have let its memory be overwritten, which is no damage.
  context_.requireNobodyGaveUp();
  throw PeerFailure(message_);
}

}  // namespace mscclpp_ep::cpu
