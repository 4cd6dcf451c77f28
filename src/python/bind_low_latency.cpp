// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>

#include "array.hpp"
#include "bind.hpp"
#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/sizes.hpp"

namespace mscclpp_ep::python {

namespace {

using Release = nb::call_guard<nb::gil_scoped_release>;

TensorView viewOf(const View* view) { return view == nullptr ? TensorView{} : view->view; }

/// What a dispatch has sent, and the memory in which it will receive.
struct DispatchSent {
  PendingReceive pending;
  Tensor x;
  Tensor scales;
  Tensor recvCount;
  Tensor sourceIndex;
  Tensor layoutRange;
};

/// Ordinary memory of [L, R * M, S], in which S is the slowest: as DeepEP's callers want it.
Tensor columnMajorScales(Buffer& buffer, std::int64_t experts, std::int64_t slots,
                         std::int64_t scales, DataType dtype) {
  Tensor tensor = buffer.emptyLocal(std::array{experts, scales, slots}, dtype);
  tensor.view.shape = {experts, slots, scales};
  tensor.view.strides = {scales * slots, 1, slots};
  return tensor;
}

/// Memory for what a dispatch receives. Sizes that the library would refuse give none: its own
/// checks then say what is wrong.
LowLatencyDispatchOutputs makeOutputs(Buffer& buffer, const TensorView& x,
                                      const LowLatencyDispatchOptions& options,
                                      DispatchSent& sent) {
  const std::int64_t ranks = buffer.size();
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const std::int64_t most = options.maxTokensPerRank;
  if (x.ndim != 2 || most < 1 || most > kMost / ranks) return {};
  if (options.numExperts < 1 || options.numExperts > kMost) return {};
  std::int64_t experts = numLocalExperts(options.numExperts, buffer.size(), buffer.rank());
  const auto& map = buffer.options().expertMap;
  if (!map.empty()) experts = std::count(map.begin(), map.end(), buffer.rank());
  const std::int64_t slots = ranks * most;
  const bool quantised = options.quantization != Quantization::none;
  const std::int64_t groups = (x.shape[1] + 127) / 128;
  sent.x = buffer.emptyLocal(std::array{experts, slots, x.shape[1]},
                             quantised ? DataType::float8E4m3 : x.dtype);
  if (options.quantization == Quantization::float8Ue8m0) {
    sent.scales = columnMajorScales(buffer, experts, slots, (groups + 3) / 4, DataType::int32);
  } else if (quantised) {
    sent.scales = columnMajorScales(buffer, experts, slots, groups, DataType::float32);
  }
  sent.recvCount = buffer.emptyLocal(std::array{experts}, DataType::int32);
  sent.sourceIndex = buffer.emptyLocal(std::array{experts, slots}, DataType::int32);
  sent.layoutRange = buffer.emptyLocal(std::array{experts, ranks}, DataType::int64);
  LowLatencyDispatchOutputs outputs;
  outputs.x = sent.x.view;
  outputs.scales = sent.scales.view;
  outputs.recvCount = sent.recvCount.view;
  outputs.sourceIndex = sent.sourceIndex.view;
  outputs.layoutRange = sent.layoutRange.view;
  return outputs;
}

/// Runs what comes before an operation; if it fails, no rank waits for this one.
template <typename Prepare>
auto orRefuse(Buffer& buffer, Operation operation, const Prepare& prepare) {
  try {
    return prepare();
  } catch (const Error& error) {
    buffer.refuse(operation, error.what());
    throw;
  }
}

DispatchSent dispatch(Buffer& buffer, const View* x, const View* topkIdx, const View* topkWeights,
                      std::int64_t maxTokensPerRank, std::int64_t numExperts,
                      Quantization quantization, const View* recvStats, const View* waitStats) {
  const LowLatencyDispatchOptions options{maxTokensPerRank, numExperts, quantization};
  DispatchSent sent{PendingReceive(nullptr), {}, {}, {}, {}, {}};
  LowLatencyDispatchOutputs outputs = orRefuse(buffer, Operation::lowLatencyDispatch, [&] {
    return makeOutputs(buffer, viewOf(x), options, sent);
  });
  outputs.recvStats = viewOf(recvStats);
  outputs.waitStats = viewOf(waitStats);
  sent.pending = buffer.lowLatencyDispatch({viewOf(x), viewOf(topkIdx), viewOf(topkWeights)},
                                           options, outputs);
  return sent;
}

PendingReceive combine(Buffer& buffer, const View* x, const View* topkIdx, const View* topkWeights,
                       const LowLatencyHandle& handle, bool exact, bool logfmt, const View* out,
                       const View* waitStats) {
  return buffer.lowLatencyCombine({viewOf(x), viewOf(topkIdx), viewOf(topkWeights)}, handle,
                                  {exact, logfmt}, {viewOf(out), viewOf(waitStats)});
}

void queryMasks(Buffer& buffer, const View& status, std::optional<std::uintptr_t> stream) {
  buffer.queryMasks(status.view, stream ? streamOf(*stream) : Stream());
}

}  // namespace

void bindLowLatency(nb::module_& m, nb::class_<Buffer>& buffer) {
  nb::enum_<Quantization>(m, "Quantization", "How a low-latency dispatch sends rows.")
      .value("none", Quantization::none)
      .value("float8", Quantization::float8)
      .value("float8_rounded", Quantization::float8Rounded)
      .value("float8_ue8m0", Quantization::float8Ue8m0);
  nb::class_<LowLatencyHandle>(m, "LowLatencyHandle", "What a low-latency dispatch leaves.")
      .def_prop_ro("epoch", &LowLatencyHandle::epoch);
  nb::class_<PendingReceive>(m, "PendingReceive", "An operation sent and not received.")
      .def_prop_ro("handle", &PendingReceive::handle);
  nb::class_<DispatchSent>(m, "DispatchSent", "A low-latency dispatch, and where it receives.")
      .def_ro("pending", &DispatchSent::pending)
      .def_ro("x", &DispatchSent::x)
      .def_ro("scales", &DispatchSent::scales)
      .def_ro("recv_count", &DispatchSent::recvCount)
      .def_ro("source_index", &DispatchSent::sourceIndex)
      .def_ro("layout_range", &DispatchSent::layoutRange);
  buffer
      .def("low_latency_dispatch", &dispatch, nb::arg("x").none(), nb::arg("topk_idx").none(),
           nb::arg("topk_weights").none(), nb::arg("max_tokens_per_rank"), nb::arg("num_experts"),
           nb::arg("quantization"), nb::arg("recv_stats").none(), nb::arg("wait_stats").none(),
           Release())
      .def("low_latency_combine", &combine, nb::arg("x").none(), nb::arg("topk_idx").none(),
           nb::arg("topk_weights").none(), nb::arg("handle"), nb::arg("exact"), nb::arg("logfmt"),
           nb::arg("out").none(), nb::arg("wait_stats").none(), Release())
      .def(
          "receive", [](Buffer& self, const PendingReceive& pending) { self.receive(pending); },
          nb::arg("pending"), Release())
      .def("query_masks", &queryMasks, nb::arg("mask_status"),
           nb::arg("stream").none() = nb::none(), Release());
}

}  // namespace mscclpp_ep::python
