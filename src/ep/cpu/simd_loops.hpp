// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CPU_SIMD_LOOPS_HPP_
#define MSCCLPP_EP_CPU_SIMD_LOOPS_HPP_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/numeric.hpp"
#include "cpu/simd.hpp"

// The loops of RowKernels, written once over types that say how an instruction set does a line.
//
// Each simd_<set>.cpp is compiled for another instruction set. Were an inline function compiled in
// two of them, the linker would keep either, and the portable set could die of an illegal
// instruction. So everything here is a template over types that the source file declares in its
// anonymous namespace, and these files call no inline function of the standard library.

namespace mscclpp_ep::cpu {

#if defined(__SANITIZE_THREAD__)
#define MSCCLPP_EP_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MSCCLPP_EP_THREAD_SANITIZER 1
#endif
#endif

/// ThreadSanitizer does not see streaming stores, and would miss the races they take part in.
#if defined(MSCCLPP_EP_THREAD_SANITIZER)
inline constexpr bool kStreamingStores = false;
#else
inline constexpr bool kStreamingStores = true;
#endif

/// What a streaming store must fill, or memory is read before it is written.
inline constexpr std::size_t kLineBytes = 64;

/// How far ahead a sum asks for its rows. Where rows come from memory this gives a quarter more
/// speed, since the processor's own prefetching stops at the end of each page.
inline constexpr std::size_t kPrefetchBytes = 1024;

// The sets. An object that is not built is not referred to.
extern const RowKernels kPortableKernels;
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;

/// The fastest set that this processor can run if `name` is null or empty, else the one of that
/// name. Throws InvalidArgument if there is none. rowKernels() is this with MSCCLPP_EP_SIMD.
const RowKernels& selectRowKernels(const char* name);

/// Bytes of `out` before its first whole line, of which there may be fewer.
template <class Tag>
std::size_t bytesToLine(const void* out, std::size_t bytes) {
  const std::size_t head = -reinterpret_cast<std::uintptr_t>(out) & (kLineBytes - 1);
  return head < bytes ? head : bytes;
}

/// RowKernels::streamCopy. `Line` holds the bytes of a line: load(address), stream(address).
///
/// The parts of the row are copied side by side, a line of each at a time: one stream of loads
/// leaves the memory waiting, mostly where the prefetcher of the processor stops at a page's end.
template <class Line>
void streamCopy(void* out, const void* in, std::size_t n) {
  constexpr std::size_t kParts = 4;
  auto* to = static_cast<std::byte*>(out);
  const auto* from = static_cast<const std::byte*>(in);
  const std::size_t head = kStreamingStores ? bytesToLine<Line>(to, n) : n;
  if (head != 0) std::memcpy(to, from, head);
  const std::size_t part = (n - head) / (kParts * kLineBytes) * kLineBytes;
  for (std::size_t at = head; at < head + part; at += kLineBytes) {
    Line lines[kParts];
    for (std::size_t i = 0; i < kParts; ++i) lines[i].load(from + at + i * part);
    for (std::size_t i = 0; i < kParts; ++i) lines[i].stream(to + at + i * part);
  }
  std::size_t at = head + kParts * part;
  for (; n - at >= kLineBytes; at += kLineBytes) {
    Line line;
    line.load(from + at);
    line.stream(to + at);
  }
  if (at != n) std::memcpy(to + at, from + at, n - at);
}

/// RowKernels::copy.
template <class Line>
void cachedCopy(void* out, const void* in, std::size_t n) {
  constexpr std::size_t kLines = 8;
  auto* to = static_cast<std::byte*>(out);
  const auto* from = static_cast<const std::byte*>(in);
  std::size_t at = bytesToLine<Line>(to, n);
  if (at != 0) std::memcpy(to, from, at);
  for (; n - at >= kLines * kLineBytes; at += kLines * kLineBytes) {
    Line lines[kLines];
    for (std::size_t i = 0; i < kLines; ++i) lines[i].load(from + at + i * kLineBytes);
    for (std::size_t i = 0; i < kLines; ++i) lines[i].store(to + at + i * kLineBytes);
  }
  if (at != n) std::memcpy(to + at, from + at, n - at);
}

/// A row of sums in the making.
struct SumJob {
  std::byte* out;
  const void* const* rows;
  const float* weights;  ///< one a row, if the sums are weighted
  std::size_t numRows;
  std::size_t bytes;
  float start;
};

template <class Line, bool kWeighted>
inline void addRow(Line& sum, const std::byte* elements, const SumJob& job, std::size_t row) {
  if constexpr (kWeighted) {
    sum.addScaled(elements, job.weights[row]);
  } else {
    sum.add(elements);
  }
}

/// Sums `bytes` bytes at `at`, fewer than a line.
template <class Line, bool kWeighted>
void sumPartOfLine(const SumJob& job, std::size_t at, std::size_t bytes) {
  alignas(kLineBytes) std::byte line[kLineBytes] = {};
  Line sum;
  sum.fill(job.start);
  for (std::size_t r = 0; r < job.numRows; ++r) {
    std::memcpy(line, static_cast<const std::byte*>(job.rows[r]) + at, bytes);
    addRow<Line, kWeighted>(sum, line, job, r);
  }
  sum.store(line);
  std::memcpy(job.out + at, line, bytes);
}

/// Sums `kLines` whole lines at `at`: enough at a time to hide the latency of the additions.
template <class Line, std::size_t kLines, bool kStream, bool kWeighted>
inline void sumLines(const SumJob& job, std::size_t at) {
  Line sums[kLines];
  for (std::size_t i = 0; i < kLines; ++i) sums[i].fill(job.start);
  for (std::size_t r = 0; r < job.numRows; ++r) {
    const auto* row = static_cast<const std::byte*>(job.rows[r]) + at;
    if (at + kPrefetchBytes < job.bytes) {
      for (std::size_t i = 0; i < kLines; ++i) {
        __builtin_prefetch(row + kPrefetchBytes + i * kLineBytes);
      }
    }
    for (std::size_t i = 0; i < kLines; ++i) {
      addRow<Line, kWeighted>(sums[i], row + i * kLineBytes, job, r);
    }
  }
  for (std::size_t i = 0; i < kLines; ++i) {
    std::byte* out = job.out + at + i * kLineBytes;
    if constexpr (kStream) {
      sums[i].stream(out);
    } else {
      sums[i].store(out);
    }
  }
}

template <class Line, bool kStream, bool kWeighted>
void sumBytes(const SumJob& job, std::size_t bytes) {
  constexpr std::size_t kLines = Line::kLinesAtOnce;
  std::size_t at = kStream ? bytesToLine<Line>(job.out, bytes) : 0;
  if (at != 0) sumPartOfLine<Line, kWeighted>(job, 0, at);
  for (; bytes - at >= kLines * kLineBytes; at += kLines * kLineBytes) {
    sumLines<Line, kLines, kStream, kWeighted>(job, at);
  }
  for (; bytes - at >= kLineBytes; at += kLineBytes) {
    sumLines<Line, 1, kStream, kWeighted>(job, at);
  }
  if (at != bytes) sumPartOfLine<Line, kWeighted>(job, at, bytes - at);
}

/// RowKernels::sum. `Line` holds the float32 sums of a line of `out`, of which there are
/// Line::kElements: fill(float), add(address), addScaled(address, weight), and store(address) and
/// stream(address), which round.
template <class Line>
void sumRows(void* out, const void* const* rows, std::size_t numRows, std::size_t n, float start,
             bool stream) {
  const std::size_t bytes = n * (kLineBytes / Line::kElements);
  const SumJob job{static_cast<std::byte*>(out), rows, nullptr, numRows, bytes, start};
  if (stream && kStreamingStores) {
    sumBytes<Line, true, false>(job, bytes);
  } else {
    sumBytes<Line, false, false>(job, bytes);
  }
}

/// RowKernels::weightedSum.
template <class Line>
void weightedSumRows(void* out, const void* const* rows, const float* weights, std::size_t numRows,
                     std::size_t n) {
  const std::size_t bytes = n * (kLineBytes / Line::kElements);
  const SumJob job{static_cast<std::byte*>(out), rows, weights, numRows, bytes, 0.0F};
  sumBytes<Line, false, true>(job, bytes);
}

/// The scale of a group of which `amax` is the largest magnitude, and its inverse, which is kept.
struct GroupScale {
  float scale;
  float inverse;
};

/// As DeepEP: 448 / amax, or the power of two that is the next at or below.
template <class Group>
GroupScale groupScale(float amax, bool powersOfTwo) {
  const float inverse = amax * (1.0F / 448.0F);
  if (!powersOfTwo) return {448.0F / amax, inverse};
  const auto bits = __builtin_bit_cast(std::uint32_t, inverse);
  const std::uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFFu) != 0 ? 1u : 0u);
  // An infinite amax has no scale: it leaves zeros, and NaN where it stood.
  const std::uint32_t scale = exponent >= 254u ? 0u : (254u - exponent) << 23;
  return {__builtin_bit_cast(float, scale), __builtin_bit_cast(float, exponent << 23)};
}

/// Quantises kGroupSize elements, and returns the inverse of their scale.
template <class Group>
float quantizeGroup(std::byte* out, const std::byte* in, bool powersOfTwo) {
  // Magnitudes of floats are in the order of their bits.
  const std::uint32_t bits = std::uint32_t{Group::largest(in)} << 16;
  const float largest = __builtin_bit_cast(float, bits);
  const GroupScale scale = groupScale<Group>(largest > 1e-4F ? largest : 1e-4F, powersOfTwo);
  Group::round(in, scale.scale, out);
  return scale.inverse;
}

/// RowKernels::quantize. `Group` does kGroupSize elements of bfloat16: largest(elements), the
/// largest magnitude that is no NaN, and round(elements, scale, out).
template <class Group>
void quantizeRow(void* out, float* scales, const void* in, std::size_t n, bool powersOfTwo) {
  auto* to = static_cast<std::byte*>(out);
  const auto* from = static_cast<const std::byte*>(in);
  std::size_t at = 0;
  for (; n - at >= kGroupSize; at += kGroupSize) {
    // The input is new, as a rule: the processor's own prefetching ends with each page.
    for (std::size_t i = 0; i < kGroupSize * 2; i += kLineBytes) {
      __builtin_prefetch(from + at * 2 + kPrefetchBytes + i);
    }
    *scales++ = quantizeGroup<Group>(to + at, from + at * 2, powersOfTwo);
  }
  if (at == n) return;
  std::byte elements[kGroupSize * 2] = {};
  std::byte rounded[kGroupSize];
  std::memcpy(elements, from + at * 2, (n - at) * 2);
  *scales = quantizeGroup<Group>(rounded, elements, powersOfTwo);
  std::memcpy(to + at, rounded, n - at);
}

}  // namespace mscclpp_ep::cpu

#endif  // MSCCLPP_EP_CPU_SIMD_LOOPS_HPP_
