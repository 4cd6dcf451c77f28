// SPDX-License-Identifier: MIT
// The checksum of the integrity mode. It tells damage, not an attack: it has no secret.
#ifndef MSCCLPP_EP_CORE_CHECKSUM_HPP_
#define MSCCLPP_EP_CORE_CHECKSUM_HPP_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mscclpp_ep {

namespace detail {

// Odd words without a pattern (digits of pi): what matters is that no data has them.
inline constexpr std::uint64_t kSalt[4] = {0x243F6A8885A308D3U, 0x13198A2E03707345U,
                                           0xA4093822299F31D1U, 0x082EFA98EC4E6C89U};

/// Both halves of the product, folded: every bit of either factor reaches all of the result.
inline std::uint64_t foldedProduct(std::uint64_t a, std::uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  const Wide product = Wide{a} * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

/// Takes 64 bytes into four chains, which do not wait for each other's multiplication.
inline void addBlock(std::uint64_t (&chains)[4], const std::byte* block) {
  std::uint64_t words[8];
  std::memcpy(words, block, sizeof(words));
  for (std::size_t c = 0; c < 4; ++c) {
    chains[c] = foldedProduct(words[2 * c] ^ kSalt[c], words[2 * c + 1] ^ chains[c]);
  }
}

}  // namespace detail

/// The checksum of what `sum` is that of, and a word behind it.
inline std::uint64_t extendChecksum(std::uint64_t sum, std::uint64_t word) {
  return detail::foldedProduct(sum ^ detail::kSalt[0], word ^ detail::kSalt[1]);
}

/// The checksum of what `sum` is that of, and these bytes behind it. It depends on their order and
/// number.
inline std::uint64_t checksum(const void* data, std::size_t bytes, std::uint64_t sum = 0) {
  constexpr std::size_t kBlock = 64;
  const auto* at = static_cast<const std::byte*>(data);
  std::uint64_t chains[4];
  for (std::size_t c = 0; c < 4; ++c) chains[c] = sum ^ detail::kSalt[3 - c];
  std::size_t left = bytes;
  for (; left >= kBlock; left -= kBlock, at += kBlock) detail::addBlock(chains, at);
  if (left > 0) {
    std::byte last[kBlock] = {};
    std::memcpy(last, at, left);
    detail::addBlock(chains, last);
  }
  sum = extendChecksum(sum, bytes);
  for (const std::uint64_t chain : chains) sum = extendChecksum(sum, chain);
  return sum;
}

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_CHECKSUM_HPP_
