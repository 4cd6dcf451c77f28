// SPDX-License-Identifier: MIT
#include "cpu/integrity.hpp"

#include "core/check.hpp"
#include "core/damage.hpp"

namespace mscclpp_ep::cpu {

void RowVerifier::note(int source, std::int64_t token, std::uint64_t sum,
                       const RowSeal& seal) const {
  const std::lock_guard lock(mutex_);
  const std::pair<int, std::int64_t> which(source, token);
  if (!message_.empty() && first_ <= which) return;
  first_ = which;
  message_ = cat(operation_, " (epoch ", epoch_, ") on rank ", context_.rank(), ": ",
                 describeDamage({sum, packTag(source, token, epoch_)}, seal));
}

void RowVerifier::throwIfDamaged() const {
  const std::lock_guard lock(mutex_);
  if (message_.empty()) return;
  // A rank that gave up may have let its memory be overwritten, which is no damage.
  context_.requireNobodyGaveUp();
  throw PeerFailure(message_);
}

}  // namespace mscclpp_ep::cpu
