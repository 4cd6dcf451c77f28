// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_SIMD_HPP_
#define MSCCLPP_EP_CPU_SIMD_HPP_

#include <cstddef>
#include <span>
#include <string_view>

namespace mscclpp_ep::cpu {

/// Element types that sums are made of.
enum class SumType { bfloat16 = 0, float16 = 1, float32 = 2 };

/// Elements that share a scale when rows are quantised.
inline constexpr std::size_t kGroupSize = 128;

/// One set of the inner loops. Every set gives the same bits; they differ in speed only.
struct RowKernels {
  std::string_view name;  ///< "portable", "avx2", "avx512"

  /// Copies n bytes with streaming stores, which leave the cache alone. A fence (`streamFence`)
  /// must stand between it and the signal that tells of the bytes.
  void (*streamCopy)(void* out, const void* in, std::size_t n);

  /// Copies n bytes that another core reads soon. Unlike the C library's copy of a long row (one
  /// `rep movsb`), it leaves the bytes in the cache of this core.
  void (*copy)(void* out, const void* in, std::size_t n);

  /// out[j] = round(start + rows[0][j] + rows[1][j] + …), summed in float32 in that order and
  /// rounded once to nearest even; NaNs become 0x7FFF, or 0x7FFFFFFF in float32. `n` elements.
  /// `out` is none of the rows. `stream`: write with streaming stores.
  void (*sum[3])(void* out, const void* const* rows, std::size_t numRows, std::size_t n,
                 float start, bool stream);

  /// out[j] = round(fma(rows[1][j], weights[1], fma(rows[0][j], weights[0], 0)) …): each step one
  /// fused float32 operation, in that order, and the last result rounded as by `sum`.
  void (*weightedSum[3])(void* out, const void* const* rows, const float* weights,
                         std::size_t numRows, std::size_t n);

  /// Rounds n bfloat16 elements to float8 e4m3, after a scale for each group of kGroupSize, of
  /// which the inverse is stored: with `powersOfTwo` a power of two.
  void (*quantize)(void* out, float* scales, const void* in, std::size_t n, bool powersOfTwo);
};

/// The fastest set that this processor can run, or the one named by MSCCLPP_EP_SIMD. Throws
/// InvalidArgument if that names none of availableRowKernels().
const RowKernels& rowKernels();

/// Every set that this processor can run, the portable one first.
std::span<const RowKernels* const> availableRowKernels();

/// Orders streaming stores before what follows.
void streamFence();

/// Sets the rounding and denormal modes that the results are defined for, and restores the
/// caller's at the end of the scope.
class FloatingPointModes {
 public:
  FloatingPointModes();
  ~FloatingPointModes();
  FloatingPointModes(const FloatingPointModes&) = delete;
  FloatingPointModes& operator=(const FloatingPointModes&) = delete;

 private:
  unsigned saved_;
};

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_SIMD_HPP_
