// SPDX-License-Identifier: MIT
// Sockets between the processes of one host: they carry descriptors of memory, and their end tells
// of a peer's death.
#ifndef MSCCLPP_EP_TRANSPORT_UNIX_SOCKET_HPP_
#define MSCCLPP_EP_TRANSPORT_UNIX_SOCKET_HPP_

#include <sys/types.h>

#include <cstddef>
#include <optional>
#include <span>
#include <string>

#include "transport/file_descriptor.hpp"

namespace mscclpp_ep {

/// Listens at an abstract address: `name` lives in the network namespace, in no file system.
FileDescriptor listenAbstract(const std::string& name);
/// Connects to it; empty if too many others wait to be accepted. Throws SystemError if nobody
/// listens there.
FileDescriptor connectAbstract(const std::string& name);
/// A connection that waits to be accepted, if there is one.
FileDescriptor acceptPending(int listener);

struct PeerCredentials {
  pid_t pid = 0;  ///< 0 if the peer is in another process namespace
  uid_t uid = 0;
};
PeerCredentials peerCredentials(int socket);

/// Sends one message, with a descriptor unless `fd` is -1. False if there is no room now; true also
/// if the peer is gone.
bool sendMessage(int socket, std::span<const std::byte> message, int fd);

struct ReceivedMessage {
  std::size_t bytes = 0;
  FileDescriptor fd;
};
enum class Arrival { message, nothing, closed };
/// Takes one message into `buffer`, without waiting. Of one that does not fit `received.bytes` is
/// larger than the buffer.
Arrival receiveMessage(int socket, std::span<std::byte> buffer, ReceivedMessage& received);

/// A descriptor that becomes readable when the process ends; empty if the kernel has none.
FileDescriptor openProcess(pid_t pid);

/// Whether `fd` can be read, or has ended, now.
bool readable(int fd);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_UNIX_SOCKET_HPP_
