// SPDX-License-Identifier: MIT
// Memory whose surroundings tell of reads and writes that go astray.
#ifndef MSCCLPP_EP_TEST_SUPPORT_BYTES_HPP_
#define MSCCLPP_EP_TEST_SUPPORT_BYTES_HPP_

#include <doctest/doctest.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mscclpp_ep::testing {

/// Memory at a given distance from the start of a line, with bytes before and after it that
/// nothing may change.
class GuardedBytes {
 public:
  GuardedBytes(std::size_t size, std::size_t offset) : size_(size) {
    bytes_.assign(size + offset + 4 * kLine, kGuard);
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    begin_ = kLine + (-address & (kLine - 1)) + offset;
  }

  std::byte* data() { return bytes_.data() + begin_; }

  bool isGuardIntact() const {
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if ((i < begin_ || i >= begin_ + size_) && bytes_[i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr std::byte kGuard{0xA5};
  static constexpr std::size_t kLine = 64;
  std::vector<std::byte> bytes_;
  std::size_t size_;
  std::size_t begin_;
};

/// Memory that ends at a page which cannot be read, and begins after another.
class FencedBytes {
 public:
  explicit FencedBytes(std::size_t pages) : size_(pages * kPage) {
    void* base = ::mmap(nullptr, size_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(base != MAP_FAILED);
    base_ = static_cast<std::byte*>(base);
    REQUIRE(::mprotect(base_ + kPage, size_, PROT_READ | PROT_WRITE) == 0);
  }
  ~FencedBytes() { ::munmap(base_, size_ + 2 * kPage); }
  FencedBytes(const FencedBytes&) = delete;
  FencedBytes& operator=(const FencedBytes&) = delete;

  std::byte* begin() const { return base_ + kPage; }
  std::byte* end() const { return begin() + size_; }

 private:
  static constexpr std::size_t kPage = 65536;  // a multiple of every processor's
  std::byte* base_;
  std::size_t size_;
};

}  // namespace mscclpp_ep::testing

#endif  // MSCCLPP_EP_TEST_SUPPORT_BYTES_HPP_
