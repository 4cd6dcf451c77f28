// SPDX-License-Identifier: MIT
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep {

// Out of line, so that the type information of each class is in this library only, and a class
// thrown here is caught in any other shared object.
Error::~Error() = default;
InvalidArgument::~InvalidArgument() = default;
Timeout::~Timeout() = default;
PeerFailure::~PeerFailure() = default;
CudaError::~CudaError() = default;
SystemError::~SystemError() = default;
NotBuilt::~NotBuilt() = default;

}  // namespace mscclpp_ep
