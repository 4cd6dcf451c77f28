// SPDX-License-Identifier: MIT
// What a fuzzer's bytes are read as, and which errors a harness lets pass.
#ifndef MSCCLPP_EP_FUZZ_SUPPORT_INPUT_HPP_
#define MSCCLPP_EP_FUZZ_SUPPORT_INPUT_HPP_

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "core/agreement.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::fuzz {

using Bytes = std::vector<std::byte>;

/// The bytes of an input, taken from the front. At its end everything is 0.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : rest_(data, size) {}

  std::size_t left() const { return rest_.size(); }

  template <typename T>
  T take() {
    T value{};
    const std::size_t bytes = std::min(sizeof(T), rest_.size());
    if (bytes > 0) std::memcpy(&value, rest_.data(), bytes);
    rest_ = rest_.subspan(bytes);
    return value;
  }
  bool flag() { return (take<std::uint8_t>() & 1) != 0; }
  /// A number from 0 to `most`.
  std::int64_t upTo(std::int64_t most) { return take<std::uint8_t>() % (most + 1); }

  std::string text(std::size_t bytes) {
    const std::size_t taken = std::min(bytes, rest_.size());
    std::string text(reinterpret_cast<const char*>(rest_.data()), taken);
    rest_ = rest_.subspan(taken);
    return text;
  }
  std::string text() { return text(rest_.size()); }

  /// Overwrites some words of a record, or cuts it: what a broken peer may make of it. The words
  /// are mostly those at which arithmetic goes wrong.
  void damage(Bytes& record) {
    for (std::int64_t count = upTo(4); count > 0 && !record.empty(); --count) {
      const std::size_t word = take<std::uint16_t>();
      const std::uint64_t value = number();
      if (word >= 0xFF00) {
        record.resize(word % (record.size() + 1));
        continue;
      }
      const std::size_t at = word * 4 % record.size();
      const std::size_t bytes = std::min(sizeof(value), record.size() - at);
      std::memcpy(record.data() + at, &value, bytes);
    }
  }

  std::uint64_t number() {
    constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();
    constexpr std::array<std::uint64_t, 12> kEdges{0,
                                                   1,
                                                   static_cast<std::uint64_t>(-1),
                                                   static_cast<std::uint64_t>(kLeast),
                                                   ~std::uint64_t{0} >> 1,
                                                   std::uint64_t{1} << 31,
                                                   (std::uint64_t{1} << 31) - 1,
                                                   std::uint64_t{1} << 32,
                                                   static_cast<std::uint64_t>(-8),
                                                   std::uint64_t{1} << 56,
                                                   0xFFFFFFFF,
                                                   static_cast<std::uint64_t>(kLeast + 8)};
    const auto kind = take<std::uint8_t>();
    if (kind < kEdges.size()) return kEdges[kind];
    return kind < 128 ? take<std::uint8_t>() : take<std::uint64_t>();
  }

 private:
  std::span<const std::uint8_t> rest_;
};

/// Runs `work`, which may end in an error of the library's own; any other leaves the harness and
/// ends the program. True if it ended well.
template <typename Work>
bool endsTyped(const Work& work) {
  try {
    work();
    return true;
  } catch (const OperationRefused& refused) {
    try {
      std::rethrow_exception(refused.error);
    } catch (const Error&) {
      return false;
    }
  } catch (const Error&) {
    return false;
  }
}

/// Ends the program unless `condition`.
inline void must(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

}  // namespace mscclpp_ep::fuzz

#endif  // MSCCLPP_EP_FUZZ_SUPPORT_INPUT_HPP_
