// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TRANSPORT_CUDA_CHECK_HPP_
#define MSCCLPP_EP_TRANSPORT_CUDA_CHECK_HPP_

#include <cuda_runtime_api.h>

#include "core/check.hpp"

/// Throws CudaError with cat(...) and the runtime's text if a call fails:
/// `EP_CUDA_TRY(cudaSetDevice(n), "cannot use GPU ", n);`
#define EP_CUDA_TRY(call, ...)                                                                 \
  do {                                                                                         \
    const cudaError_t ep_result = (call);                                                      \
    if (ep_result != cudaSuccess) [[unlikely]] {                                               \
      (void)cudaGetLastError();                                                                \
      throw ::mscclpp_ep::CudaError(                                                           \
          ::mscclpp_ep::cat(__VA_ARGS__, ": ", cudaGetErrorString(ep_result), " (CUDA error ", \
                            static_cast<int>(ep_result), ")"));                                \
    }                                                                                          \
  } while (false)

namespace mscclpp_ep {

/// Whether work on the GPU is done, as a query has answered. Throws CudaError with `what` if the
/// work failed.
inline bool isDone(cudaError_t answer, const char* what) {
  if (answer != cudaErrorNotReady) {
    EP_CUDA_TRY(answer, what);
    return true;
  }
  // Or the next launch of a kernel is taken to have failed.
  (void)cudaGetLastError();
  return false;
}

/// Lets this thread call what might wait for the GPU, which is forbidden while a graph is captured,
/// by any thread, unless it says so.
class RelaxedCapture {
 public:
  // What is called next fails if this does.
  RelaxedCapture() noexcept { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

/// The current GPU of this thread.
inline int currentDevice() {
  int device = 0;
  EP_CUDA_TRY(cudaGetDevice(&device), "cannot tell the current GPU");
  return device;
}

/// Makes a GPU the current one of this thread, and restores the one before at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) : before_(currentDevice()) {
    EP_CUDA_TRY(cudaSetDevice(device), "cannot use GPU ", device);
  }
  ~CurrentDevice() { (void)cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_CUDA_CHECK_HPP_
