// SPDX-License-Identifier: MIT
#include "cpu/simd.hpp"

#include <cfenv>
#include <cstdlib>
#include <string>
#if !defined(MSCCLPP_EP_PORTABLE_ONLY)
#include <cpuid.h>
#endif
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "cpu/simd_loops.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::cpu {
namespace {

/// The sets that this processor can run, from the portable one to the fastest.
struct AvailableKernels {
  const RowKernels* sets[3];
  std::size_t count;
};

#if defined(MSCCLPP_EP_PORTABLE_ONLY)
AvailableKernels findAvailableKernels() { return {{&kPortableKernels, nullptr, nullptr}, 1}; }
#else
/// Clang's __builtin_cpu_supports() does not know "f16c" before version 19.
bool hasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool canRunAvx2() {
  return __builtin_cpu_supports("avx2") && hasF16c() && __builtin_cpu_supports("fma");
}

bool canRunAvx512() {
  return canRunAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

AvailableKernels findAvailableKernels() {
  __builtin_cpu_init();  // a constructor of the user's program may be what calls us
  AvailableKernels available{{&kPortableKernels, nullptr, nullptr}, 1};
  if (canRunAvx2()) available.sets[available.count++] = &kAvx2Kernels;
  if (canRunAvx512()) available.sets[available.count++] = &kAvx512Kernels;
  return available;
}
#endif

// The register of the modes, and its value for rounding to nearest with denormals kept and
// exceptions masked.
#if defined(__SSE2__)
constexpr unsigned kDefinedModes = 0x1F80;
unsigned modes() { return _mm_getcsr(); }
void setModes(unsigned value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
constexpr unsigned kDefinedModes = 0;
unsigned modes() {
  unsigned long value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return static_cast<unsigned>(value);
}
void setModes(unsigned value) {
  asm volatile("msr fpcr, %0" : : "r"(static_cast<unsigned long>(value)));
}
#else
constexpr unsigned kDefinedModes = FE_TONEAREST;
unsigned modes() { return static_cast<unsigned>(std::fegetround()); }
void setModes(unsigned value) { std::fesetround(static_cast<int>(value)); }
#endif

}  // namespace

const RowKernels& selectRowKernels(const char* name) {
  const auto available = availableRowKernels();
  if (name == nullptr || *name == '\0') return *available.back();
  std::string names;
  for (const RowKernels* set : available) {
    if (set->name == name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw InvalidArgument("MSCCLPP_EP_SIMD is '" + std::string(name) +
                        "', which this processor or this build does not have; it can be " + names +
                        ", or unset for the fastest.");
}

const RowKernels& rowKernels() {
  static const RowKernels& chosen = selectRowKernels(std::getenv("MSCCLPP_EP_SIMD"));
  return chosen;
}

std::span<const RowKernels* const> availableRowKernels() {
  static const AvailableKernels available = findAvailableKernels();
  return {available.sets, available.count};
}

void streamFence() {
#if defined(__SSE2__)
  if constexpr (kStreamingStores) _mm_sfence();
#endif
}

FloatingPointModes::FloatingPointModes() : saved_(modes()) { setModes(kDefinedModes); }

FloatingPointModes::~FloatingPointModes() { setModes(saved_); }

}  // namespace mscclpp_ep::cpu
