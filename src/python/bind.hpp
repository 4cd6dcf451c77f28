// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_PYTHON_BIND_HPP_
#define MSCCLPP_EP_PYTHON_BIND_HPP_

#include <nanobind/nanobind.h>

#include <bit>
#include <cstdint>

#include "mscclpp_ep/bootstrap.hpp"
#include "mscclpp_ep/buffer.hpp"

namespace mscclpp_ep::python {

/// A buffer that other threads of Python need not wait for while it leaves: it may be dropped
/// anywhere.
class UnlockedBuffer final : public mscclpp_ep::Buffer {
 public:
  using mscclpp_ep::Buffer::Buffer;
  UnlockedBuffer(const UnlockedBuffer&) = delete;
  UnlockedBuffer& operator=(const UnlockedBuffer&) = delete;
  ~UnlockedBuffer() {
    const nanobind::gil_scoped_release release;
    leave();
  }
};
using Buffer = UnlockedBuffer;

void bindErrors(nanobind::module_& m);
void bindTypes(nanobind::module_& m);
void bindBuffer(nanobind::module_& m);
void bindEvent(nanobind::module_& m);
/// Types of low-latency mode; its operations are added to `buffer`.
void bindLowLatency(nanobind::module_& m, nanobind::class_<Buffer>& buffer);

/// A stream is given as the number that its cudaStream_t is.
inline Stream streamOf(std::uintptr_t stream) { return Stream(std::bit_cast<void*>(stream)); }

/// Asks a Python group (rank, size, all_gather, barrier) what a Bootstrap is asked.
class PythonBootstrap final : public Bootstrap {
 public:
  /// `group` must outlive this; called with the GIL.
  explicit PythonBootstrap(nanobind::handle group);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::vector<Bytes> allGather(std::span<const std::byte> mine) override;
  void barrier() override;

 private:
  nanobind::handle group_;
  int rank_;
  int size_;
};

}  // namespace mscclpp_ep::python

#endif  // MSCCLPP_EP_PYTHON_BIND_HPP_
