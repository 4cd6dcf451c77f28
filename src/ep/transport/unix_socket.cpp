// SPDX-License-Identifier: MIT
#include "transport/unix_socket.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <cerrno>
#include <cstring>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

struct Address {
  sockaddr_un address{};
  socklen_t bytes = 0;
};

Address abstractAddress(const std::string& name) {
  Address result;
  result.address.sun_family = AF_UNIX;
  EP_EXPECTS(name.size() + 1 <= sizeof(result.address.sun_path), "a socket's name has ",
             name.size(), " bytes; at most ", sizeof(result.address.sun_path) - 1, " fit");
  std::memcpy(result.address.sun_path + 1, name.data(), name.size());
  result.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return result;
}

FileDescriptor makeSocket(int flags) {
  return FileDescriptor(EP_SYS_TRY(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0),
                                   "cannot make a Unix socket"));
}

bool wouldBlock(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

/// The descriptor that came with a message. A stranger may send several: the others are closed.
FileDescriptor takeDescriptor(msghdr& header) {
  FileDescriptor first;
  for (cmsghdr* control = CMSG_FIRSTHDR(&header); control != nullptr;
       control = CMSG_NXTHDR(&header, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(control) + i * sizeof(fd), sizeof(fd));
      FileDescriptor received(fd);
      if (!first) first = std::move(received);
    }
  }
  return first;
}

}  // namespace

FileDescriptor listenAbstract(const std::string& name) {
  FileDescriptor listener = makeSocket(SOCK_NONBLOCK);
  const Address address = abstractAddress(name);
  EP_SYS_TRY(
      ::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address.address), address.bytes),
      "cannot bind an abstract Unix socket");
  EP_SYS_TRY(::listen(listener.get(), SOMAXCONN), "cannot listen on a Unix socket");
  return listener;
}

FileDescriptor connectAbstract(const std::string& name) {
  FileDescriptor socket = makeSocket(SOCK_NONBLOCK);
  const Address address = abstractAddress(name);
  const int result =
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address.address), address.bytes);
  if (result < 0 && wouldBlock(errno)) return {};
  EP_SYS_TRY(result, "cannot connect to a rank's Unix socket");
  return socket;
}

FileDescriptor acceptPending(int listener) {
  return FileDescriptor(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
}

PeerCredentials peerCredentials(int socket) {
  ucred credentials{};
  socklen_t bytes = sizeof(credentials);
  EP_SYS_TRY(::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes),
             "cannot tell who is at the other end of a Unix socket");
  return {credentials.pid, credentials.uid};
}

bool sendMessage(int socket, std::span<const std::byte> message, int fd) {
  iovec part{const_cast<std::byte*>(message.data()), message.size()};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (fd >= 0) {
    header.msg_control = space;
    header.msg_controllen = sizeof(space);
    cmsghdr* control = CMSG_FIRSTHDR(&header);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(control), &fd, sizeof(fd));
  }
  const ssize_t sent = ::sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (sent < 0 && (wouldBlock(errno) || errno == ETOOMANYREFS)) return false;
  // Nobody is there to take it, which whoever waits for that peer is told.
  if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return true;
  EP_SYS_TRY(sent, "cannot send to a rank over its Unix socket");
  return true;
}

Arrival receiveMessage(int socket, std::span<std::byte> buffer, ReceivedMessage& received) {
  iovec part{buffer.data(), buffer.size()};
  alignas(cmsghdr) char space[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = space;
  header.msg_controllen = sizeof(space);
  // MSG_TRUNC: of a longer message its whole length, so that it is not taken for one that fits.
  constexpr int kFlags = MSG_DONTWAIT | MSG_CMSG_CLOEXEC | MSG_TRUNC;
  ssize_t bytes = ::recvmsg(socket, &header, kFlags);
  // Told once, when the other end went with messages unread. What it sent before comes after that.
  if (bytes < 0 && errno == ECONNRESET) bytes = ::recvmsg(socket, &header, kFlags);
  if (bytes < 0) return wouldBlock(errno) ? Arrival::nothing : Arrival::closed;
  if (bytes == 0) return Arrival::closed;
  received.bytes = static_cast<std::size_t>(bytes);
  received.fd = takeDescriptor(header);
  return Arrival::message;
}

FileDescriptor openProcess(pid_t pid) {
#ifdef SYS_pidfd_open
  if (pid > 0) return FileDescriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
#endif
  return {};
}

bool readable(int fd) {
  pollfd entry{fd, POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

}  // namespace mscclpp_ep
