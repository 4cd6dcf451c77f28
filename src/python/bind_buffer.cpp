// SPDX-License-Identifier: MIT
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "array.hpp"
#include "bind.hpp"
#include "mscclpp_ep/buffer.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::python {

namespace {

using Release = nb::call_guard<nb::gil_scoped_release>;

/// Lets Python handle Ctrl-C while a rank waits.
void pollSignals() {
  const nb::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

/// How a call is ordered: an argument of those that enqueue work.
struct Ordering {
  Ordering(std::optional<std::uintptr_t> stream, std::optional<Event> previous, bool async,
           int numSms) {
    if (stream) call.stream = streamOf(*stream);
    call.previous = std::move(previous);
    call.async = async;
    call.numSms = numSms;
  }
  CallOptions call;
};

Device parseDevice(const std::string& device) {
  constexpr std::string_view kCuda = "cuda:";
  if (device == "cpu") return {};
  Device parsed{DeviceType::cuda, 0};
  const char* end = device.data() + device.size();
  const bool sound = device.starts_with(kCuda) &&
                     std::from_chars(device.data() + kCuda.size(), end, parsed.index).ptr == end;
  if (!sound) throw InvalidArgument("device is \"" + device + "\"; it must be cpu or cuda:N");
  return parsed;
}

void construct(Buffer* self, nb::handle group, const BufferOptions& given) {
  BufferOptions options = given;
  options.pollInterrupt = pollSignals;
  PythonBootstrap bootstrap(group);
  const nb::gil_scoped_release release;
  new (self) Buffer(bootstrap, options);
}

Tensor outputLike(Buffer& buffer, std::initializer_list<std::int64_t> shape, DataType dtype) {
  return buffer.emptyLocal(std::span(shape.begin(), shape.size()), dtype);
}

nb::tuple getDispatchLayout(Buffer& buffer, const View& topkIdx, std::int64_t numExperts,
                            const Ordering& ordering) {
  Tensor perRank;
  Tensor perExpert;
  Tensor inRank;
  {
    const nb::gil_scoped_release release;
    const std::int64_t ranks = buffer.size();
    if (ordering.call.stream.given()) buffer.recordStream(ordering.call.stream);
    perRank = outputLike(buffer, {ranks}, DataType::int32);
    // Wrong sizes are left to the library's own checks, which come before it writes anything.
    perExpert = outputLike(buffer, {std::max<std::int64_t>(numExperts, 0)}, DataType::int32);
    inRank = outputLike(buffer, {topkIdx.view.shape[0], ranks}, DataType::boolean);
    buffer.getDispatchLayout(topkIdx.view, numExperts, {perRank.view, perExpert.view, inRank.view},
                             ordering.call);
  }
  return nb::make_tuple(perRank, perExpert, inRank);
}

/// Memory for what a dispatch receives, of each array that it has: in the arena, so that rows
/// arrive in place. What comes beside the rows themselves is small, and shares a block.
std::array<Tensor, 4> makeOutputs(Buffer& buffer, const PendingDispatch& pending,
                                  const std::array<TensorView, 4>& likes) {
  constexpr std::int64_t kAlignment = 256;
  const std::int64_t rows = pending.numRows();
  std::array<Tensor, 4> outputs;
  outputs[0] = buffer.empty({rows, likes[0].shape[1]}, likes[0].dtype);
  std::array<std::int64_t, 4> offsets{};
  std::int64_t bytes = 0;
  for (std::size_t i = 1; i < likes.size(); ++i) {
    const TensorView& like = likes[i];
    if (!like) continue;
    TensorView& view = outputs[i].view;
    view = makeView(nullptr, like.dtype, {rows, like.shape[1]}, like.device);
    offsets[i] = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    bytes = offsets[i] + static_cast<std::int64_t>(numBytes(view));
  }
  if (bytes == 0) return outputs;
  const Tensor block = buffer.empty({bytes}, DataType::uint8);
  for (std::size_t i = 1; i < likes.size(); ++i) {
    outputs[i].view.data = static_cast<std::byte*>(block.view.data) + offsets[i];
    outputs[i].owner = block.owner;
    outputs[i].inArena = block.inArena;
  }
  return outputs;
}

/// The rest of a dispatch that `begin` begins: arrays like those given, the handle, and the rows
/// per local expert, which become objects of Python when the rows are on their way.
template <typename Begin>
nb::tuple finished(Buffer& buffer, const std::array<TensorView, 4>& likes, const Begin& begin) {
  std::array<Tensor, 4> outputs;
  std::vector<std::int64_t> counts;
  const auto finish = [&] {
    const nb::gil_scoped_release release;
    PendingDispatch pending = begin();
    const std::span<const std::int64_t> given = pending.numRecvTokensPerExpert();
    counts.assign(given.begin(), given.end());
    try {
      outputs = makeOutputs(buffer, pending, likes);
    } catch (const std::exception& error) {
      buffer.abandonDispatch(std::move(pending), error.what());
      throw;
    }
    return buffer.finishDispatch(
        std::move(pending), {outputs[0].view, outputs[1].view, outputs[2].view, outputs[3].view});
  };
  DispatchHandle handle = finish();
  const auto given = [&](std::size_t i) { return likes[i] ? nb::cast(outputs[i]) : nb::none(); };
  return nb::make_tuple(nb::make_tuple(given(0), given(1), given(2), given(3)), std::move(handle),
                        counts);
}

/// Of the tensors of DispatchInputs, in their order.
nb::tuple dispatch(Buffer& buffer, const Views& given, std::int64_t expertAlignment,
                   std::int64_t numWorstTokens, const Ordering& ordering) {
  const DispatchInputs inputs{given[0], given[1], given[2], given[3], given[4], given[5], given[6]};
  const DispatchOptions options{.expertAlignment = expertAlignment,
                                .numWorstTokens = numWorstTokens};
  return finished(buffer, {inputs.x, inputs.scales, inputs.topkIdx, inputs.topkWeights},
                  [&] { return buffer.beginDispatch(inputs, options, ordering.call); });
}

/// Of x and scales.
nb::tuple cachedDispatch(Buffer& buffer, const Views& given, const DispatchHandle& handle,
                         const Ordering& ordering) {
  DispatchInputs inputs;
  inputs.x = given[0];
  inputs.scales = given[1];
  return finished(buffer, {inputs.x, inputs.scales, {}, {}},
                  [&] { return buffer.beginCachedDispatch(inputs, handle, ordering.call); });
}

/// A sum for each token. A wrong number of dimensions is left to the library's own checks.
Tensor makeSums(Buffer& buffer, const DispatchHandle& handle, const TensorView& rows) {
  const std::int64_t shape[] = {handle.numTokens(), rows.shape[std::max(rows.ndim - 1, 0)]};
  return buffer.emptyLocal(std::span(shape, rows.ndim > 1 ? 2 : 1), rows.dtype);
}

/// What the caller has to be told of is not what becomes of it.
void refuseQuietly(Buffer& buffer, Operation operation, const char* why) {
  try {
    buffer.refuse(operation, why);
  } catch (const Error&) {
    // Expected: the buffer has failed, which its next call reports.
  }
}

/// Of the tensors of CombineInputs, in their order: the sums of the first two.
nb::tuple combine(Buffer& buffer, const Views& given, const DispatchHandle& handle,
                  const Ordering& ordering) {
  Tensor out;
  std::optional<Tensor> outWeights;
  {
    const nb::gil_scoped_release release;
    try {
      // Before there is memory for results, which a graph that is captured keeps.
      if (ordering.call.stream.given()) buffer.recordStream(ordering.call.stream);
      out = makeSums(buffer, handle, given[0]);
      if (given[1]) outWeights = makeSums(buffer, handle, given[1]);
    } catch (const std::exception& error) {
      refuseQuietly(buffer, Operation::combine, error.what());
      throw;
    }
    buffer.combine({given[0], given[1], given[2], given[3]}, handle,
                   {out.view, outWeights ? outWeights->view : TensorView{}}, ordering.call);
  }
  return nb::make_tuple(out, outWeights);
}

Tensor empty(Buffer& buffer, const std::vector<std::int64_t>& shape, DataType dtype, bool arena,
             std::optional<std::uintptr_t> stream) {
  if (!arena) return buffer.emptyLocal(shape, dtype);
  return buffer.empty(shape, dtype, stream ? streamOf(*stream) : Stream());
}

void bindOrdering(nb::module_& m) {
  nb::class_<Ordering>(m, "Ordering", "How a call is ordered with other work on a GPU.")
      .def(nb::init<std::optional<std::uintptr_t>, std::optional<Event>, bool, int>(),
           nb::arg("stream").none() = nb::none(), nb::arg("previous").none() = nb::none(),
           nb::arg("asynchronous") = false, nb::arg("num_sms") = 0)
      .def_prop_ro("stream", [](const Ordering& self) -> std::optional<std::uintptr_t> {
        if (!self.call.stream.given()) return std::nullopt;
        return reinterpret_cast<std::uintptr_t>(self.call.stream.handle());
      });
}

void bindOptions(nb::module_& m) {
  nb::class_<BufferOptions>(m, "BufferOptions", "How a buffer is made.")
      .def(nb::init<>())
      .def_prop_rw(
          "device", [](const BufferOptions& self) { return toString(self.device); },
          [](BufferOptions& self, const std::string& device) { self.device = parseDevice(device); })
      .def_prop_rw(
          "timeout", [](const BufferOptions& self) { return self.timeout.count(); },
          [](BufferOptions& self, double seconds) {
            self.timeout = std::chrono::duration<double>(seconds);
          })
      .def_rw("arena_bytes", &BufferOptions::arenaBytes)
      .def_rw("max_arena_bytes", &BufferOptions::maxArenaBytes)
      .def_rw("num_threads", &BufferOptions::numThreads)
      .def_rw("sm_margin", &BufferOptions::smMargin)
      .def_rw("ranks_per_domain", &BufferOptions::ranksPerDomain)
      .def_rw("expert_map", &BufferOptions::expertMap)
      .def_rw("integrity_check", &BufferOptions::integrityCheck)
      .def_rw("first_epoch", &BufferOptions::firstEpoch)
      .def_rw("enable_shrink", &BufferOptions::enableShrink)
      .def_rw("trace", &BufferOptions::trace);
}

void bindStats(nb::module_& m) {
  nb::class_<BufferStats>(m, "BufferStats", "Where the memory of a buffer is, and what moved.")
      .def_ro("arena_bytes", &BufferStats::arenaBytes)
      .def_ro("held_bytes", &BufferStats::heldBytes)
      .def_ro("landing_bytes", &BufferStats::landingBytes)
      .def_ro("pooled_bytes", &BufferStats::pooledBytes)
      .def_ro("straight_rows", &BufferStats::straightRows)
      .def_ro("landed_rows", &BufferStats::landedRows)
      .def_ro("pulled_rows", &BufferStats::pulledRows)
      .def_ro("staged_rows", &BufferStats::stagedRows);
}

void bindOperations(nb::class_<Buffer>& buffer) {
  buffer
      .def("get_dispatch_layout", &getDispatchLayout, nb::arg("topk_idx"), nb::arg("num_experts"),
           nb::arg("ordering"))
      .def("dispatch", &dispatch, nb::arg("given"), nb::arg("expert_alignment"),
           nb::arg("num_worst_tokens"), nb::arg("ordering"))
      .def("cached_dispatch", &cachedDispatch, nb::arg("given"), nb::arg("handle"),
           nb::arg("ordering"))
      .def("combine", &combine, nb::arg("given"), nb::arg("handle"), nb::arg("ordering"))
      .def(
          "refuse",
          [](Buffer& self, Operation operation, const std::string& why) {
            self.refuse(operation, why);
          },
          nb::arg("operation"), nb::arg("why"), Release());
}

}  // namespace

void bindBuffer(nb::module_& m) {
  bindOptions(m);
  bindStats(m);
  bindOrdering(m);
  nb::enum_<Operation>(m, "Operation", "The collective operations.")
      .value("dispatch", Operation::dispatch)
      .value("cached_dispatch", Operation::cachedDispatch)
      .value("combine", Operation::combine)
      .value("low_latency_dispatch", Operation::lowLatencyDispatch)
      .value("low_latency_combine", Operation::lowLatencyCombine);
  nb::class_<Buffer> buffer(m, "Buffer", "The C++ Buffer; mscclpp_ep.Buffer is the public one.");
  buffer.def("__init__", &construct, nb::arg("group"), nb::arg("options"))
      .def_static(
          "decline",
          [](nb::handle group, const std::string& why) {
            PythonBootstrap bootstrap(group);
            const nb::gil_scoped_release release;
            Buffer::decline(bootstrap, why);
          },
          nb::arg("group"), nb::arg("why"))
      .def_prop_ro("rank", &Buffer::rank)
      .def_prop_ro("size", &Buffer::size)
      .def_prop_ro("device", [](const Buffer& self) { return toString(self.options().device); })
      .def_prop_ro("comm_stream",
                   [](const Buffer& self) {
                     return reinterpret_cast<std::uintptr_t>(self.commStream().handle());
                   })
      .def_prop_ro("num_threads", [](const Buffer& self) { return self.options().numThreads; })
      .def_prop_ro("max_arena_bytes",
                   [](const Buffer& self) { return self.options().maxArenaBytes; })
      .def_prop_ro("ranks_per_domain",
                   [](const Buffer& self) { return self.options().ranksPerDomain; })
      .def("empty", &empty, nb::arg("shape"), nb::arg("dtype"), nb::arg("arena"),
           nb::arg("stream").none() = nb::none(), Release())
      .def("read_counts", &Buffer::readCounts, nb::arg("handle"), Release())
      .def(
          "record_stream",
          [](Buffer& self, std::uintptr_t stream) { self.recordStream(streamOf(stream)); },
          nb::arg("stream"))
      .def(
          "forget_stream",
          [](Buffer& self, std::uintptr_t stream) { self.forgetStream(streamOf(stream)); },
          nb::arg("stream"))
      .def("time_push", &Buffer::timePush, nb::arg("num_bytes"), nb::arg("num_sms"),
           nb::arg("repeats"), Release(),
           "Seconds in which each rank writes so many bytes to the next one; collective.")
      .def("check", &Buffer::check, Release())
      .def("freeze", &Buffer::freeze)
      .def("masked", &Buffer::masked, nb::arg("rank"), Release())
      .def("set_mask", &Buffer::setMask, nb::arg("rank"), nb::arg("masked"), Release())
      .def("stats", &Buffer::stats)
      .def("destroy", &Buffer::destroy, Release())
      .def("leave", &Buffer::leave, Release())
      .def_prop_ro("destroyed", &Buffer::destroyed);
  bindOperations(buffer);
  bindLowLatency(m, buffer);
}

}  // namespace mscclpp_ep::python
