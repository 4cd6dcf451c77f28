// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TRANSPORT_FILE_DESCRIPTOR_HPP_
#define MSCCLPP_EP_TRANSPORT_FILE_DESCRIPTOR_HPP_

#include <unistd.h>

#include <utility>

namespace mscclpp_ep {

/// Owns a file descriptor.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileDescriptor() {
    if (fd_ >= 0) ::close(fd_);
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_FILE_DESCRIPTOR_HPP_
