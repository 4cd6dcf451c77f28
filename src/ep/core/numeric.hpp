// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CORE_NUMERIC_HPP_
#define MSCCLPP_EP_CORE_NUMERIC_HPP_

#include <bit>
#include <cstdint>

// The 16-bit floating point formats, as arithmetic on their bits: the same on every processor,
// whatever rounding or denormal mode is set.

namespace mscclpp_ep {

/// What every NaN is written as. Processors differ in the payload and the sign they give a NaN,
/// and results must not.
inline constexpr std::uint16_t kNan16 = 0x7FFF;
inline constexpr std::uint32_t kNan32 = 0x7FFFFFFF;

/// `condition ? yes : no` by masks. Where a side is computed in floating point, compilers make a
/// branch of the operator, and no vectors of the loops around it.
constexpr std::uint32_t selectBits(bool condition, std::uint32_t yes, std::uint32_t no) {
  const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

/// True for the bits of a float32 NaN, whatever its sign.
constexpr bool isNanBits(std::uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }

/// `value`, or the one NaN that is written.
constexpr float canonicalFloat(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return std::bit_cast<float>(isNanBits(bits) ? kNan32 : bits);
}

constexpr float floatFromBfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounds to nearest even; what is too large becomes infinite, NaNs become kNan16.
constexpr std::uint16_t bfloat16FromFloat(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return static_cast<std::uint16_t>(selectBits(isNanBits(bits), kNan16, rounded));
}

constexpr float floatFromFloat16(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t magnitude = bits & 0x7FFFu;
  // The exponent's bias is 15 here and 127 there; infinity and NaN keep the highest exponent.
  const std::uint32_t rebias = selectBits(magnitude >= 0x7C00u, 255u - 31u, 127u - 15u) << 23;
  const std::uint32_t normal = (magnitude << 13) + rebias;
  // A denormal counts units of 2^-24. Both steps are exact, and neither meets a float32 denormal.
  const float denormal = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;
  const auto denormalBits = std::bit_cast<std::uint32_t>(denormal);
  return std::bit_cast<float>(sign | selectBits(magnitude < 0x0400u, denormalBits, normal));
}

/// Rounds to nearest even, to denormals as well; what is too large becomes infinite, NaNs become
/// kNan16.
constexpr std::uint16_t float16FromFloat(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  constexpr std::uint32_t kLeastNormal = (127u - 14u) << 23;  // 2^-14
  constexpr std::uint32_t kTooLarge = (127u + 16u) << 23;     // 2^16

  // A carry out of the mantissa rightly raises the exponent, up to infinity.
  const std::uint32_t rebased = magnitude - ((127u - 15u) << 23);
  const std::uint32_t normal = (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13;

  // A denormal counts units of 2^-24. Every step is exact: the product, the conversion, which
  // truncates in every rounding mode, and what is left over, from 0 to below 1.
  const bool isSmall = magnitude < kLeastNormal;
  const float scaled = std::bit_cast<float>(selectBits(isSmall, magnitude, 0u)) * 0x1p24f;
  const auto whole = static_cast<std::int32_t>(scaled);
  const float rest = scaled - static_cast<float>(whole);  // -0 where modes round downwards
  const std::uint32_t left = std::bit_cast<std::uint32_t>(rest) & 0x7FFFFFFFu;
  const auto odd = static_cast<std::uint32_t>(whole) & 1u;
  const std::uint32_t up = left + odd > 0x3F000000u;  // the bits of 0.5
  const std::uint32_t denormal = static_cast<std::uint32_t>(whole) + up;

  const std::uint32_t finite = sign | selectBits(isSmall, denormal, normal);
  const std::uint32_t result = selectBits(magnitude >= kTooLarge, sign | 0x7C00u, finite);
  return static_cast<std::uint16_t>(selectBits(isNanBits(bits), kNan16, result));
}

/// The format float8 e4m3, by the bits of its numbers and of the float32 that they are compared
/// with.
struct Float8 {
  static constexpr std::uint32_t kLeastNormal = (127u - 6u) << 23;  ///< 2^-6
  static constexpr std::uint32_t kRebias = (127u - 7u) << 23;       ///< biases are 7 and 127
  static constexpr std::uint32_t kHalf = 0x7FFFFu;  ///< below half of a last place, to round
  /// A denormal counts units of 2^-9, which is the last place of this in float32.
  static constexpr float kDenormalShift = 0x1p14F;
  static constexpr std::uint32_t kLargest = 0x7Eu;  ///< 448
  static constexpr std::uint32_t kNan = 0x7Fu;
  static constexpr std::uint32_t kInfinity = 0x7F800000u;  ///< of float32
};

/// Rounds to nearest even, where the rounding mode is that; what is too large becomes 448.
constexpr std::uint8_t float8FromFloat(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > Float8::kInfinity) return Float8::kNan;
  // A carry out of the mantissa rightly raises the exponent.
  const std::uint32_t rebased = magnitude - Float8::kRebias;
  const std::uint32_t normal = (rebased + Float8::kHalf + (rebased >> 20 & 1u)) >> 20;
  const float shifted = std::bit_cast<float>(magnitude) + Float8::kDenormalShift;
  const std::uint32_t denormal = std::bit_cast<std::uint32_t>(shifted) & 0xFu;
  const std::uint32_t rounded = magnitude < Float8::kLeastNormal ? denormal : normal;
  const std::uint32_t finite = rounded > Float8::kLargest ? Float8::kLargest : rounded;
  return static_cast<std::uint8_t>(finite | (bits >> 24 & 0x80u));
}

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_NUMERIC_HPP_
