// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TRANSPORT_FILE_STORE_HPP_
#define MSCCLPP_EP_TRANSPORT_FILE_STORE_HPP_

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "core/check.hpp"
#include "transport/file_descriptor.hpp"

namespace mscclpp_ep {

/// 128 random bits in hexadecimal: nobody has drawn them before.
inline std::string makeNonce() {
  std::array<std::uint8_t, 16> random{};
  EP_SYS_TRY(::getrandom(random.data(), random.size(), 0), "cannot draw a random number");
  std::string text;
  for (const std::uint8_t byte : random) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

/// Whether a text may be what makeNonce() returned, so that it is safe as part of a name.
inline bool isNonce(std::string_view text) {
  return text.size() == 32 && text.find_first_not_of("0123456789abcdef") == text.npos;
}

/// The files whose names begin with a prefix.
class FileStore {
 public:
  explicit FileStore(const std::string& prefix) : prefix_(checked(prefix)) {}

  /// Nothing if there is no such file.
  std::optional<std::string> read(const std::string& name) const {
    const std::string path = prefix_ + name;
    // O_NONBLOCK: a pipe of this name must not make the rank wait for a writer.
    const int opened = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (opened == -1 && errno == ENOENT) return std::nullopt;
    const FileDescriptor file(EP_SYS_TRY(opened, "cannot open ", path));
    std::string text;
    std::array<char, 1 << 14> part;
    while (true) {
      const auto count = EP_SYS_TRY(::read(file.get(), part.data(), part.size()), "read ", path);
      if (count == 0) return text;
      text.append(part.data(), static_cast<std::size_t>(count));
    }
  }

  void publish(const std::string& name, std::string_view text) const {
    const std::string path = prefix_ + name;
    const std::string temporary = cat(path, ".", own_);
    try {
      write(temporary, text);
      EP_SYS_TRY(::rename(temporary.c_str(), path.c_str()), "cannot make ", path);
    } catch (...) {
      ::unlink(temporary.c_str());
      throw;
    }
  }

  void remove(const std::string& name) const { ::unlink((prefix_ + name).c_str()); }

  /// Another process, started later with the same rank, may have replaced it.
  void removeIfHolds(const std::string& name, const std::string& text) const {
    if (read(name) == text) remove(name);
  }

  void removeAll(const std::string& beginning) const {
    namespace fs = std::filesystem;
    const fs::path path(prefix_ + beginning);
    for (const auto& entry : fs::directory_iterator(path.parent_path())) {
      if (entry.path().filename().string().starts_with(path.filename().string())) {
        ::unlink(entry.path().c_str());
      }
    }
  }

 private:
  static std::string checked(const std::string& prefix) {
    namespace fs = std::filesystem;
    std::error_code ignored;
    EP_EXPECTS(fs::path(prefix).has_filename() && !fs::is_directory(prefix, ignored),
               "the path of a bootstrap is '", prefix,
               "'; it must be the beginning of a file name, such as /tmp/run7, and no folder");
    const fs::path path = fs::absolute(prefix);
    EP_EXPECTS(fs::is_directory(path.parent_path(), ignored), "the path of a bootstrap is '",
               prefix, "', but there is no folder ", path.parent_path().string());
    return path.string();
  }

  static void write(const std::string& path, std::string_view text) {
    constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW;
    const FileDescriptor file(EP_SYS_TRY(::open(path.c_str(), kFlags, 0600), "cannot make ", path));
    while (!text.empty()) {
      const auto count = EP_SYS_TRY(::write(file.get(), text.data(), text.size()), "write ", path);
      text.remove_prefix(static_cast<std::size_t>(count));
    }
  }

  const std::string prefix_;
  const std::string own_ = makeNonce();  // no other run has temporary files of this name
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_FILE_STORE_HPP_
