// SPDX-License-Identifier: MIT
// LogFMT-10: a row of bfloat16 in ten bits an element, a sign and the logarithm of the magnitude on
// a scale of 510 steps between the least and the largest of each 128: the format of DeepEP's
// low-latency combine.
#ifndef MSCCLPP_EP_CORE_LOGFMT_HPP_
#define MSCCLPP_EP_CORE_LOGFMT_HPP_

#include <cstddef>
#include <cstdint>
#include <span>

namespace mscclpp_ep {

/// Most bytes that a row of `hidden` elements takes: the two magnitudes of each group, and the
/// elements as they are.
std::size_t logfmtRowBytes(std::size_t hidden);

/// Encodes `row`. Chunks (of 1024 elements if the row has a multiple of them, else of 512) in which
/// a group has a magnitude of 1 or more, or only one magnitude, are left as they are. Returns the
/// bytes used, which are no more than logfmtRowBytes.
std::size_t encodeLogfmt(std::span<const std::uint16_t> row, std::byte* out);

/// Decodes what encodeLogfmt wrote; values are rounded to bfloat16. Reads no more than
/// logfmtRowBytes, whatever the bytes are.
void decodeLogfmt(const std::byte* in, std::span<std::uint16_t> row);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_LOGFMT_HPP_
