// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/check.hpp"

namespace mscclpp_ep {
namespace {

template <typename E, typename F>
std::string messageOf(const F& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST_CASE("cat writes numbers of every width in decimal") {
  CHECK(cat(std::uint8_t{65}, " ", std::int8_t{-1}, " ", std::uint16_t{65535}) == "65 -1 65535");
  CHECK(cat(std::numeric_limits<std::int64_t>::min()) == "-9223372036854775808");
  CHECK(cat(std::numeric_limits<std::uint64_t>::max()) == "18446744073709551615");
  CHECK(cat(0.25, " ", 100.0, " ", 1.5f) == "0.25 100 1.5");
}

TEST_CASE("cat writes texts, flags, ranges and what has a toString") {
  const std::string text = "b";
  CHECK(cat("a", text, std::string_view("c"), 'd') == "abcd");
  CHECK(cat(true, " ", false) == "true false");
  CHECK(cat("[", std::vector{1, 2, 3}, "] [", std::vector<int>{}, "]") == "[1, 2, 3] []");
  CHECK(cat(std::vector<std::string>{"x", "y"}) == "x, y");
  CHECK(cat(DataType::bfloat16, " on ", Device{DeviceType::cuda, 3}) == "bfloat16 on cuda:3");
  CHECK(cat().empty());
}

TEST_CASE("EP_EXPECTS throws its text, and makes it only then") {
  int made = 0;
  const auto text = [&] {
    ++made;
    return "given";
  };
  CHECK_NOTHROW([&] { EP_EXPECTS(made == 0, text(), 1); }());
  CHECK(made == 0);
  CHECK(messageOf<InvalidArgument>([&] { EP_EXPECTS(made > 0, text(), " ", 1); }) == "given 1");
  CHECK(made == 1);
}

TEST_CASE("EP_SYS_TRY gives the value of a call, or its error") {
  const int fd = EP_SYS_TRY(::open("/dev/null", O_RDONLY | O_CLOEXEC), "open");
  CHECK(fd >= 0);
  CHECK(EP_SYS_TRY(::close(fd), "close") == 0);
  const auto clobbersErrno = [] {
    errno = EPERM;
    return "/no/such/file";
  };
  const std::string message = messageOf<SystemError>(
      [&] { EP_SYS_TRY(::open("/no/such/file", O_RDONLY), "cannot open ", clobbersErrno()); });
  CHECK(message == "cannot open /no/such/file: No such file or directory (errno 2)");
}

TEST_CASE("EP_SYS_TRY knows MAP_FAILED") {
  const auto map = [](std::size_t bytes) {
    return EP_SYS_TRY(::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), "map");
  };
  CHECK(messageOf<SystemError>([&] { map(0); }) == "map: Invalid argument (errno 22)");
  void* const page = map(4096);
  CHECK(page != nullptr);
  CHECK(::munmap(page, 4096) == 0);
}

TEST_CASE("every error is an Error") {
  CHECK_THROWS_AS(throw InvalidArgument("x"), Error);
  CHECK_THROWS_AS(throw Timeout("x"), Error);
  CHECK_THROWS_AS(throw PeerFailure("x"), Error);
  CHECK_THROWS_AS(throw CudaError("x"), Error);
  CHECK_THROWS_AS(throw SystemError("x"), Error);
  CHECK_THROWS_AS(throw NotBuilt("x"), Error);
  CHECK(messageOf<std::runtime_error>([] { throw NotBuilt("why"); }) == "why");
}

}  // namespace
}  // namespace mscclpp_ep
