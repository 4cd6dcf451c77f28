// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "array.hpp"
#include "bind.hpp"
#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/memory_pool.hpp"
#include "mscclpp_ep/sizes.hpp"

namespace mscclpp_ep::python {

namespace {

template <typename T>
std::vector<T> copyOf(std::span<const T> values) {
  return {values.begin(), values.end()};
}

std::vector<std::int64_t> shapeOf(const TensorView& view) {
  return {std::begin(view.shape), std::begin(view.shape) + view.ndim};
}

void bindTensors(nb::module_& m) {
  nb::enum_<DataType> dtypes(m, "DataType", "Element types.");
  for (int i = 0; i <= static_cast<int>(DataType::float8E5m2Fnuz); ++i) {
    const auto dtype = static_cast<DataType>(i);
    dtypes.value(name(dtype), dtype);
  }
  nb::class_<View>(m, "View", "A tensor of the caller's, imported by DLPack.")
      .def(
          "__init__",
          [](View* self, nb::handle array, std::optional<DataType> dtype) {
            new (self) View(importArray(array, dtype));
          },
          nb::arg("array"), nb::arg("dtype").none() = nb::none())
      .def_static(
          "of", [](const Tensor& tensor) { return View{{}, {}, tensor.view}; }, nb::arg("tensor"),
          nb::keep_alive<0, 1>(), "A view of memory of a buffer.")
      .def_prop_ro("dtype", [](const View& view) { return view.view.dtype; })
      .def_prop_ro("shape", [](const View& view) { return shapeOf(view.view); })
      .def("__repr__", [](const View& view) { return toString(view.view); });
  nb::class_<Views>(m, "Views", "The tensors of a call.")
      .def(
          "__init__",
          [](Views* self, const nb::sequence& arrays) { new (self) Views(importArrays(arrays)); },
          nb::arg("arrays"));
  nb::class_<Tensor>(m, "Tensor", "Memory of a buffer.")
      .def(
          "export",
          [](const Tensor& tensor, const char* framework) {
            return exportTensor(tensor, framework);
          },
          nb::arg("framework"), "To \"numpy\", \"torch\" or \"dlpack\".")
      .def("export_as", &exportAs, nb::arg("type"),
           "As a type with __dlpack_c_exchange_api__; None if it has none.")
      .def_prop_ro("dtype", [](const Tensor& tensor) { return tensor.view.dtype; })
      .def_prop_ro("shape", [](const Tensor& tensor) { return shapeOf(tensor.view); })
      .def_ro("in_arena", &Tensor::inArena)
      .def("__repr__", [](const Tensor& tensor) { return toString(tensor.view); });
}

void bindPool(nb::module_& m) {
  nb::class_<MemoryPool>(m, "MemoryPool", "Gives out parts of a tensor by functions of C.")
      .def(nb::init<Tensor>(), nb::arg("memory"))
      .def_prop_ro("allocate_name", &MemoryPool::allocateName)
      .def_prop_ro("free_name", &MemoryPool::freeName)
      .def_prop_ro("used_bytes", &MemoryPool::usedBytes);
}

void bindHandle(nb::module_& m) {
  nb::class_<HandleFields>(m, "HandleFields", "Counts of a handle in the memory of the GPU.")
      .def_ro("num_recv_tokens", &HandleFields::numRecvTokens)
      .def_ro("num_recv_tokens_per_expert", &HandleFields::numRecvTokensPerExpert)
      .def_ro("rank_prefix_matrix", &HandleFields::rankPrefixMatrix)
      .def_ro("num_send_tokens", &HandleFields::numSendTokens)
      .def_ro("channel_prefix", &HandleFields::channelPrefix);
  nb::class_<DispatchHandle>(m, "DispatchHandle", "What a dispatch leaves for combine.")
      .def_prop_ro("num_tokens", &DispatchHandle::numTokens)
      .def_prop_ro("num_rows", &DispatchHandle::numRows)
      .def_prop_ro("num_recv_tokens", &DispatchHandle::numRecvTokens)
      .def_prop_ro("epoch", &DispatchHandle::epoch)
      .def_prop_ro("num_recv_tokens_per_expert",
                   [](const DispatchHandle& h) { return copyOf(h.numRecvTokensPerExpert()); })
      .def_prop_ro("num_send_tokens",
                   [](const DispatchHandle& h) { return copyOf(h.numSendTokens()); })
      .def_prop_ro("recv_rank_prefix_sum",
                   [](const DispatchHandle& h) { return copyOf(h.recvRankPrefixSum()); })
      .def_prop_ro("fields", &DispatchHandle::fields)
      .def_prop_ro("recv_source_index", &DispatchHandle::recvSourceIndex)
      .def_prop_ro("send_head", &DispatchHandle::sendHead)
      .def_prop_ro("is_token_in_rank", &DispatchHandle::isTokenInRank);
}

void bindSizes(nb::module_& m) {
  m.def("item_size", &itemSize, nb::arg("dtype"), "Bytes of one element.");
  nb::class_<Config>(m, "Config", "Tuned numbers of DeepEP's kernels; here they only size hints.")
      .def(
          "__init__",
          [](Config* self, std::int64_t numSms, std::int64_t nvlSend, std::int64_t nvlRecv,
             std::int64_t rdmaSend, std::int64_t rdmaRecv) {
            new (self) Config(checked({numSms, nvlSend, nvlRecv, rdmaSend, rdmaRecv}));
          },
          nb::arg("num_sms") = 20, nb::arg("num_max_nvl_chunked_send_tokens") = 6,
          nb::arg("num_max_nvl_chunked_recv_tokens") = 256,
          nb::arg("num_max_rdma_chunked_send_tokens") = 6,
          nb::arg("num_max_rdma_chunked_recv_tokens") = 256)
      .def_ro("num_sms", &Config::numSms)
      .def("get_nvl_buffer_size_hint", &nvlBufferSizeHint, nb::arg("hidden_bytes"),
           nb::arg("num_ranks"))
      .def("get_rdma_buffer_size_hint", &rdmaBufferSizeHint, nb::arg("hidden_bytes"),
           nb::arg("num_ranks"));
  m.def("low_latency_rdma_size_hint", &lowLatencyRdmaSizeHint,
        nb::arg("num_max_dispatch_tokens_per_rank"), nb::arg("hidden"), nb::arg("num_ranks"),
        nb::arg("num_experts"));
  m.def("num_local_experts", &numLocalExperts, nb::arg("num_experts"), nb::arg("num_ranks"),
        nb::arg("rank"));
}

}  // namespace

void bindTypes(nb::module_& m) {
  bindTensors(m);
  bindPool(m);
  bindHandle(m);
  bindSizes(m);
}

}  // namespace mscclpp_ep::python
