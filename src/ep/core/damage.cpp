// SPDX-License-Identifier: MIT
#include "core/damage.hpp"

#include <charconv>
#include <iterator>

#include "core/check.hpp"

namespace mscclpp_ep {

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

std::string describeDamage(const RowSeal& expected, const RowSeal& sent) {
  const std::string difference =
      sent.tag != expected.tag ? cat("its tag (epochs modulo 65536) is of ", describeTag(sent.tag),
                                     " instead of ", describeTag(expected.tag))
                               : cat("its checksum was ", hex(sent.checksum),
                                     " when it was sent, and is now ", hex(expected.checksum));
  return cat("the integrity check failed for what rank ", tagRank(expected.tag), " sent for token ",
             tagToken(expected.tag), ": ", difference);
}

}  // namespace mscclpp_ep
