// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_CORE_CHECK_HPP_
#define MSCCLPP_EP_CORE_CHECK_HPP_

#include <cerrno>
#include <charconv>
#include <concepts>
#include <cstdint>
#include <ranges>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {
namespace detail {

template <typename T>
void append(std::string& out, const T& value) {
  if constexpr (std::convertible_to<const T&, std::string_view>) {
    out += std::string_view(value);
  } else if constexpr (std::same_as<T, bool>) {
    out += value ? "true" : "false";
  } else if constexpr (std::same_as<T, char>) {
    out += value;
  } else if constexpr (std::is_arithmetic_v<T>) {
    char text[64];
    const char* end = std::to_chars(text, text + sizeof(text), value).ptr;
    out.append(text, static_cast<std::size_t>(end - text));
  } else if constexpr (std::same_as<T, DataType>) {
    out += name(value);
  } else if constexpr (std::ranges::input_range<const T&>) {
    std::string_view separator;
    for (const auto& element : value) {
      out += std::exchange(separator, ", ");
      append(out, element);
    }
  } else {
    out += toString(value);
  }
}

/// `what` is called after errno has been read, as making a text may change it.
template <typename T, typename MakeText>
T sysTry(T result, const MakeText& what) {
  bool failed;
  if constexpr (std::is_pointer_v<T>) {
    failed = reinterpret_cast<std::intptr_t>(result) == -1;  // MAP_FAILED
  } else {
    failed = result == T{-1};
  }
  if (failed) [[unlikely]] {
    const int error = errno;
    std::string text = what();
    append(text, ": ");
    append(text, std::system_category().message(error));
    append(text, " (errno ");
    append(text, error);
    append(text, ")");
    throw SystemError(text);
  }
  return result;
}

}  // namespace detail

/// The parts as one text. Numbers of every width are written in decimal (a uint8_t is no
/// character), ranges as "1, 2, 3", and anything else by its `toString`.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::string out;
  (detail::append(out, parts), ...);
  return out;
}

}  // namespace mscclpp_ep

/// Throws InvalidArgument with cat(...) unless `condition` holds; the text is made only then.
#define EP_EXPECTS(condition, ...)                                         \
  do {                                                                     \
    if (!(condition)) [[unlikely]]                                         \
      throw ::mscclpp_ep::InvalidArgument(::mscclpp_ep::cat(__VA_ARGS__)); \
  } while (false)

/// The value of a system call. If it is -1 (or MAP_FAILED), throws SystemError with cat(...) and
/// the text of errno: `const int fd = EP_SYS_TRY(::open(path, flags), "cannot open ", path);`
#define EP_SYS_TRY(call, ...) \
  ::mscclpp_ep::detail::sysTry((call), [&] { return ::mscclpp_ep::cat(__VA_ARGS__); })

#endif  // MSCCLPP_EP_CORE_CHECK_HPP_
