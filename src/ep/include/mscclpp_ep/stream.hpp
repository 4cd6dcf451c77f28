// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_STREAM_HPP_
#define MSCCLPP_EP_STREAM_HPP_

#include <cstddef>

namespace mscclpp_ep {

/// A CUDA stream that the caller owns. It cannot be made from 0 or nullptr by accident; a
/// default-made one is "no stream", the only one that a buffer on the CPU takes.
class Stream {
 public:
  constexpr Stream() = default;
  /// `handle` is a cudaStream_t; null is CUDA's default stream, which is a stream all the same.
  constexpr explicit Stream(void* handle) : handle_(handle), given_(true) {}
  Stream(int) = delete;
  Stream(std::nullptr_t) = delete;

  constexpr void* handle() const { return handle_; }
  constexpr bool given() const { return given_; }

  friend constexpr bool operator==(Stream, Stream) = default;

 private:
  void* handle_ = nullptr;
  bool given_ = false;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_STREAM_HPP_
