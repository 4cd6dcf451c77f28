// SPDX-License-Identifier: MIT
#include "mscclpp_ep/buffer.hpp"

#include <atomic>
#include <type_traits>

#include "core/backend.hpp"
#include "core/check.hpp"
#include "core/memory_map.hpp"
#include "core/validate.hpp"
#include "core/validate_low_latency.hpp"
#include "mscclpp_ep/version.hpp"

namespace mscclpp_ep {

namespace {

std::uint64_t nextBufferId() {
  static std::atomic<std::uint64_t> next{1};
  return next.fetch_add(1);
}

const char* name(DeviceType type) { return type == DeviceType::cuda ? "cuda" : "cpu"; }

std::string fingerprint(const BufferOptions& options) {
  std::string text =
      cat("version ", MSCCLPP_EP_VERSION_MAJOR, ".", MSCCLPP_EP_VERSION_MINOR, ".",
          MSCCLPP_EP_VERSION_PATCH, ", device ", name(options.device.type), ", ranks_per_domain ",
          options.ranksPerDomain, ", first_epoch ", options.firstEpoch, ", enable_shrink ",
          options.enableShrink, ", integrity_check ", options.integrityCheck, ", expert_map");
  if (options.expertMap.empty()) return text + " none";
  for (const std::int32_t rank : options.expertMap) text += cat(" ", rank);
  return text;
}

/// Checks the options, and lets the other ranks know if they are refused.
std::shared_ptr<Backend> connect(Bootstrap& bootstrap, BufferOptions& options, std::uint64_t id) {
  try {
    validateOptions(options, bootstrap.size());
  } catch (const Error& error) {
    declineToConnect(bootstrap, error.what());
    throw;
  }
  const bool onGpu = options.device.type == DeviceType::cuda;
  const auto make = onGpu ? makeCudaBackend : makeCpuBackend;
  return make(bootstrap, {"", fingerprint(options)}, options, id);
}

void checkRank(const BufferFacts& facts, int rank) {
  EP_EXPECTS(rank >= 0 && rank < facts.numRanks, "rank is ", rank, "; it must be 0 to ",
             facts.numRanks - 1);
}

}  // namespace

void declineToConnect(Bootstrap& bootstrap, std::string_view why) {
  BufferOptions defaults;
  try {
    makeCpuBackend(bootstrap, {std::string(why), ""}, defaults, 0);
  } catch (const Error&) {
    // Expected: a refused admission always ends in an error, and the caller has one that says why.
  }
}

class Buffer::Impl {
 public:
  Impl(Bootstrap& bootstrap, const BufferOptions& given)
      : options(given),
        id(nextBufferId()),
        facts{bootstrap.rank(), bootstrap.size(), id, options},
        backend_(connect(bootstrap, options, id)) {}
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  Backend& backend() const {
    EP_EXPECTS(backend_ != nullptr, "the buffer is destroyed; make a new one");
    return *backend_;
  }
  bool destroyed() const { return backend_ == nullptr; }

  void leave() noexcept { backend_.reset(); }
  void destroy() {
    // The buffer is gone even if saying goodbye to the others fails.
    if (const auto backend = std::move(backend_)) backend->destroy();
  }

  /// Runs the checks of a collective operation. If they fail, the operation is refused, so that the
  /// other ranks do not wait for this one.
  template <typename Check>
  auto checkedOrRefused(Operation operation, const CallOptions& call, const Check& check) {
    Backend& target = backend();
    try {
      validateCall(facts, call);
      target.beginCall(call);
      return check();
    } catch (const std::exception& error) {
      refuseQuietly(target, operation, error.what());
      rejoin(call);
      throw;
    }
  }

  /// Runs what makes up the call, or its last part.
  template <typename Work>
  auto ended(const CallOptions& call, const Work& work) {
    Backend& target = backend();
    try {
      if constexpr (std::is_void_v<decltype(work())>) {
        work();
        target.endCall(call);
      } else {
        auto result = work();
        target.endCall(call);
        return result;
      }
    } catch (...) {
      rejoin(call);
      throw;
    }
  }

  void abandon(PendingState& state, std::string_view why) {
    const CallOptions call = state.request.call;
    backend().abandonDispatch(state, why);
    rejoin(call);
  }

  /// The first part of a dispatch.
  PendingDispatch begun(DispatchRequest request) {
    const CallOptions call = request.call;
    try {
      return PendingDispatch(backend().beginDispatch(std::move(request)));
    } catch (...) {
      rejoin(call);
      throw;
    }
  }

  std::shared_ptr<const ExpertPlacement> placement(std::int64_t numExperts) {
    if (placement_ == nullptr || placement_->numExperts() != numExperts) {
      placement_ = std::make_shared<ExpertPlacement>(numExperts, facts.numRanks, options.expertMap);
    }
    return placement_;
  }

  Tensor allocate(std::span<const std::int64_t> shape, DataType dtype, MemoryKind kind,
                  Stream stream = {}) {
    EP_EXPECTS(shape.size() <= kMaxDimensions, "a shape of ", shape.size(),
               " dimensions was given; at most ", kMaxDimensions, " are allowed");
    std::size_t bytes = itemSize(dtype);
    TensorView view;
    view.dtype = dtype;
    view.ndim = static_cast<int>(shape.size());
    view.device = options.device;
    std::int64_t stride = 1;
    for (std::size_t i = shape.size(); i-- > 0;) {
      EP_EXPECTS(shape[i] >= 0, "shape[", i, "] is ", shape[i], "; it must not be negative");
      view.shape[i] = shape[i];
      view.strides[i] = stride;
      stride *= shape[i];
      bytes = arrayBytes(shape[i], bytes);
    }
    Tensor tensor = backend().allocate(bytes, kind, stream);
    view.data = tensor.view.data;
    tensor.view = view;
    return tensor;
  }

  BufferOptions options;
  const std::uint64_t id;
  BufferFacts facts;

 private:
  /// After a call that has failed there is no event to wait for. What its stream has been made to
  /// wait for must be waited for by the caller's, as a graph may be captured.
  void rejoin(CallOptions call) {
    call.async = false;
    try {
      if (backend_ != nullptr) backend_->endCall(call);
    } catch (const Error&) {
      // Expected: what the call failed of may be the GPU, and comes first.
    }
  }

  static void refuseQuietly(Backend& backend, Operation operation, std::string_view why) {
    try {
      backend.refuse(operation, why);
    } catch (const Error&) {
      // Expected: the buffer has failed, which its next call reports. The caller's own mistake
      // comes first.
    }
  }

  std::shared_ptr<Backend> backend_;
  std::shared_ptr<const ExpertPlacement> placement_;
};

Buffer::Buffer(Bootstrap& bootstrap, const BufferOptions& options)
    : impl_(std::make_unique<Impl>(bootstrap, options)) {}
Buffer::Buffer(Buffer&&) noexcept = default;
Buffer& Buffer::operator=(Buffer&&) noexcept = default;
Buffer::~Buffer() = default;

Buffer::Impl& Buffer::impl() const {
  EP_EXPECTS(impl_ != nullptr, "the buffer was moved from");
  return *impl_;
}

void Buffer::decline(Bootstrap& bootstrap, std::string_view why) {
  declineToConnect(bootstrap, why);
}

int Buffer::rank() const { return impl().facts.rank; }
int Buffer::size() const { return impl().facts.numRanks; }
void Buffer::recordStream(Stream stream) { impl().backend().recordStream(stream); }
void Buffer::forgetStream(Stream stream) { impl().backend().forgetStream(stream); }
std::vector<double> Buffer::timePush(std::size_t bytes, int numSms, int repeats) {
  EP_EXPECTS(bytes > 0, "num_bytes is 0; it must be positive");
  EP_EXPECTS(numSms > 0, "num_sms is ", numSms, "; it must be positive");
  EP_EXPECTS(repeats > 0, "repeats is ", repeats, "; it must be positive");
  return impl().backend().timePush(bytes, numSms, repeats);
}
Stream Buffer::commStream() const { return impl().backend().commStream(); }
const BufferOptions& Buffer::options() const { return impl().options; }
bool Buffer::destroyed() const { return impl_ == nullptr || impl_->destroyed(); }

void Buffer::getDispatchLayout(const TensorView& topkIdx, std::int64_t numExperts,
                               const LayoutOutputs& outputs, const CallOptions& call) const {
  Backend& backend = impl().backend();
  validateCall(impl().facts, call);
  backend.beginCall(call);
  impl().ended(call, [&] {
    validateLayout(impl().facts, topkIdx, numExperts, outputs);
    backend.getDispatchLayout(topkIdx, *impl().placement(numExperts), outputs);
  });
}

PendingDispatch Buffer::beginDispatch(const DispatchInputs& inputs, const DispatchOptions& options,
                                      const CallOptions& call) {
  DispatchRequest request = impl().checkedOrRefused(Operation::dispatch, call, [&] {
    DispatchRequest checked = validateDispatch(impl().facts, inputs, options);
    checked.call = call;
    checked.placement = impl().placement(checked.signature.numExperts);
    impl().backend().examineRouting(checked);
    if (checked.routing.plan != nullptr) checkCounts(checked.routing);
    checked.signature.countsOnGpu = checked.countsOnHost() ? 0 : 1;
    return checked;
  });
  return impl().begun(std::move(request));
}

PendingDispatch Buffer::beginCachedDispatch(const DispatchInputs& inputs,
                                            const DispatchHandle& handle, const CallOptions& call) {
  DispatchRequest request = impl().checkedOrRefused(Operation::cachedDispatch, call, [&] {
    DispatchRequest checked = validateCachedDispatch(impl().facts, inputs, handle);
    checked.placement = impl().placement(checked.signature.numExperts);
    return checked;
  });
  request.call = call;
  return impl().begun(std::move(request));
}

DispatchHandle Buffer::finishDispatch(PendingDispatch pending, const DispatchOutputs& outputs) {
  Backend& backend = impl().backend();
  PendingState& state = pending.state();
  EP_EXPECTS(state.bufferId == impl().id, "the dispatch was begun by another buffer");
  try {
    validateDispatchOutputs(state, outputs);
  } catch (const Error& error) {
    impl().abandon(state, error.what());
    throw;
  }
  return impl().ended(state.request.call, [&] { return backend.finishDispatch(state, outputs); });
}

void Buffer::abandonDispatch(PendingDispatch pending, std::string_view why) {
  impl().abandon(pending.state(), why);
}

void Buffer::combine(const CombineInputs& inputs, const DispatchHandle& handle,
                     const CombineOutputs& outputs, const CallOptions& call) {
  CombineRequest request = impl().checkedOrRefused(Operation::combine, call, [&] {
    return validateCombine(impl().facts, inputs, handle, outputs);
  });
  request.call = call;
  impl().ended(call, [&] { impl().backend().combine(request); });
}

PendingReceive Buffer::lowLatencyDispatch(const LowLatencyDispatchInputs& inputs,
                                          const LowLatencyDispatchOptions& options,
                                          const LowLatencyDispatchOutputs& outputs,
                                          const CallOptions& call) {
  auto request = impl().checkedOrRefused(Operation::lowLatencyDispatch, call, [&] {
    return validateLowLatencyDispatch(impl().facts, inputs, options, outputs);
  });
  request.call = call;
  request.placement = impl().placement(options.numExperts);
  return PendingReceive(impl().backend().lowLatencyDispatch(std::move(request)));
}

PendingReceive Buffer::lowLatencyCombine(const LowLatencyCombineInputs& inputs,
                                         const LowLatencyHandle& handle,
                                         const LowLatencyCombineOptions& options,
                                         const LowLatencyCombineOutputs& outputs,
                                         const CallOptions& call) {
  auto request = impl().checkedOrRefused(Operation::lowLatencyCombine, call, [&] {
    return validateLowLatencyCombine(impl().facts, inputs, handle, options, outputs);
  });
  request.call = call;
  return PendingReceive(impl().backend().lowLatencyCombine(std::move(request)));
}

void Buffer::receive(const PendingReceive& pending) {
  ReceiveState& state = *pending.state();
  EP_EXPECTS(state.bufferId == impl().id, "the operation was sent by another buffer");
  EP_EXPECTS(!state.received, "the operation has been received before; receive it once");
  impl().backend().receive(state);
}

void Buffer::refuse(Operation operation, std::string_view why) {
  impl().backend().refuse(operation, why);
}

Tensor Buffer::empty(std::span<const std::int64_t> shape, DataType dtype, Stream stream) {
  return impl().allocate(shape, dtype, MemoryKind::arena, stream);
}
Tensor Buffer::empty(std::initializer_list<std::int64_t> shape, DataType dtype, Stream stream) {
  return empty(std::span(shape.begin(), shape.size()), dtype, stream);
}
Tensor Buffer::emptyLocal(std::span<const std::int64_t> shape, DataType dtype) {
  return impl().allocate(shape, dtype, MemoryKind::local);
}

std::vector<std::int64_t> Buffer::readCounts(const DispatchHandle& handle) const {
  const HandleState& state = checkHandle(impl().facts, handle);
  if (state.plan == nullptr) return impl().backend().readCounts(state);
  std::vector<std::int64_t> counts{state.numRecv()};
  counts.insert(counts.end(), state.perExpert.begin(), state.perExpert.end());
  return counts;
}
void Buffer::check() { impl().backend().check(); }
void Buffer::freeze() { impl().backend().freeze(); }
BufferStats Buffer::stats() const { return impl().backend().stats(); }
bool Buffer::masked(int rank) const {
  checkRank(impl().facts, rank);
  return impl().backend().masked(rank);
}
void Buffer::queryMasks(const TensorView& status, Stream stream) {
  EP_EXPECTS(status.dtype == DataType::int32 && status.ndim == 1 && status.shape[0] == size() &&
                 isContiguous(status),
             "mask_status is ", toString(status), "; it must be int32 [R], contiguous");
  EP_EXPECTS(status.device.type == DeviceType::cpu || status.device == impl().options.device,
             "mask_status is on ", toString(status.device), "; it must be on ",
             toString(impl().options.device), ", or on the CPU");
  std::vector<std::int32_t> masks(static_cast<std::size_t>(size()));
  for (int rank = 0; rank < size(); ++rank) {
    masks[static_cast<std::size_t>(rank)] = masked(rank) ? 1 : 0;
  }
  impl().backend().store(status, masks, stream);
}
void Buffer::setMask(int rank, bool masked) {
  EP_EXPECTS(impl().options.enableShrink, "masks need a buffer made with enable_shrink");
  checkRank(impl().facts, rank);
  EP_EXPECTS(rank != impl().facts.rank, "rank ", rank, " is this rank, which cannot be masked");
  impl().backend().setMask(rank, masked);
}
void Buffer::leave() noexcept {
  if (impl_ != nullptr) impl_->leave();
}
void Buffer::destroy() {
  if (impl_ != nullptr) impl_->destroy();
}

}  // namespace mscclpp_ep
