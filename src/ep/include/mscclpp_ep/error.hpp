// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_ERROR_HPP_
#define MSCCLPP_EP_ERROR_HPP_

#include <stdexcept>

#include "mscclpp_ep/export.hpp"

namespace mscclpp_ep {

/// Base of every error that the library throws. A message states what was given, what is allowed
/// and, where it is not obvious, what to do.
class MSCCLPP_EP_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  ~Error() override;
};

/// An argument was refused. Nothing was sent, and the buffer is still usable on every rank.
class MSCCLPP_EP_API InvalidArgument : public Error {
 public:
  using Error::Error;
  ~InvalidArgument() override;
};

/// A wait lasted longer than `BufferOptions::timeout`. The buffer can only be destroyed.
class MSCCLPP_EP_API Timeout : public Error {
 public:
  using Error::Error;
  ~Timeout() override;
};

/// Another rank refused its arguments (the buffer stays usable), gave up, or died, or what it sent
/// arrived damaged (the buffer can only be destroyed); the message says which rank and what.
class MSCCLPP_EP_API PeerFailure : public Error {
 public:
  using Error::Error;
  ~PeerFailure() override;
};

/// A call of the CUDA runtime or driver failed.
class MSCCLPP_EP_API CudaError : public Error {
 public:
  using Error::Error;
  ~CudaError() override;
};

/// The operating system refused something: memory, a descriptor, a socket.
class MSCCLPP_EP_API SystemError : public Error {
 public:
  using Error::Error;
  ~SystemError() override;
};

/// The feature is not in this build of the library, or not in this version of it.
class MSCCLPP_EP_API NotBuilt : public Error {
 public:
  using Error::Error;
  ~NotBuilt() override;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_ERROR_HPP_
