// SPDX-License-Identifier: MIT
#include "mscclpp_ep/buffer.hpp"

#include <atomic>

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
        backend_(connect(bootstrap, options, id)) {
    facts.reader = backend_.get();
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  Backend& backend() const {
    EP_EXPECTS(backend_ != nullptr, "the buffer is destroyed; make a new one");
    return *backend_;
  }
  bool destroyed() const { return backend_ == nullptr; }

  void leave() noexcept {
    facts.reader = nullptr;
    backend_.reset();
  }
  void destroy() {
    facts.reader = nullptr;
    // The buffer is gone even if saying goodbye to the others fails.
    if (const auto backend = std::move(backend_)) backend->destroy();
  }

  /// Runs the checks of a collective operation. If they fail, the operation is refused, so that the
  /// other ranks do not wait for this one.
  template <typename Check>
  auto checkedOrRefused(Operation operation, const Check& check) {
    Backend& target = backend();
    try {
      return check();
    } catch (const std::exception& error) {
      refuseQuietly(target, operation, error.what());
      throw;
    }
  }

  std::shared_ptr<const ExpertPlacement> placement(std::int64_t numExperts) {
    if (placement_ == nullptr || placement_->numExperts() != numExperts) {
      placement_ = std::make_shared<ExpertPlacement>(numExperts, facts.numRanks, options.expertMap);
    }
    return placement_;
  }

  Tensor allocate(std::span<const std::int64_t> shape, DataType dtype, MemoryKind kind) {
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
    Tensor tensor = backend().allocate(bytes, kind);
    view.data = tensor.view.data;
    tensor.view = view;
    return tensor;
  }

  BufferOptions options;
  const std::uint64_t id;
  BufferFacts facts;

 private:
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
Stream Buffer::commStream() const { return impl().backend().commStream(); }
const BufferOptions& Buffer::options() const { return impl().options; }
bool Buffer::destroyed() const { return impl_ == nullptr || impl_->destroyed(); }

void Buffer::getDispatchLayout(const TensorView& topkIdx, std::int64_t numExperts,
                               const LayoutOutputs& outputs, const CallOptions& call) const {
  Backend& backend = impl().backend();
  validateCall(impl().facts, call);
  backend.beginCall(call);
  validateLayout(impl().facts, topkIdx, numExperts, outputs);
  backend.getDispatchLayout(topkIdx, *impl().placement(numExperts), outputs);
}

PendingDispatch Buffer::beginDispatch(const DispatchInputs& inputs, const DispatchOptions& options,
                                      const CallOptions& call) {
  DispatchRequest request = impl().checkedOrRefused(Operation::dispatch, [&] {
    validateCall(impl().facts, call);
    impl().backend().beginCall(call);
    DispatchRequest checked = validateDispatch(impl().facts, inputs, options);
    checked.placement = impl().placement(checked.signature.numExperts);
    validateExpertCounts(checked);
    return checked;
  });
  request.call = call;
  return PendingDispatch(impl().backend().beginDispatch(std::move(request)));
}

PendingDispatch Buffer::beginCachedDispatch(const DispatchInputs& inputs,
                                            const DispatchHandle& handle, const CallOptions& call) {
  DispatchRequest request = impl().checkedOrRefused(Operation::cachedDispatch, [&] {
    validateCall(impl().facts, call);
    impl().backend().beginCall(call);
    DispatchRequest checked = validateCachedDispatch(impl().facts, inputs, handle);
    checked.placement = impl().placement(checked.signature.numExperts);
    return checked;
  });
  request.call = call;
  return PendingDispatch(impl().backend().beginDispatch(std::move(request)));
}

DispatchHandle Buffer::finishDispatch(PendingDispatch pending, const DispatchOutputs& outputs) {
  Backend& backend = impl().backend();
  PendingState& state = pending.state();
  EP_EXPECTS(state.bufferId == impl().id, "the dispatch was begun by another buffer");
  try {
    validateDispatchOutputs(state, outputs);
  } catch (const Error& error) {
    backend.abandonDispatch(state, error.what());
    throw;
  }
  return backend.finishDispatch(state, outputs);
}

void Buffer::abandonDispatch(PendingDispatch pending, std::string_view why) {
  impl().backend().abandonDispatch(pending.state(), why);
}

void Buffer::combine(const CombineInputs& inputs, const DispatchHandle& handle,
                     const CombineOutputs& outputs, const CallOptions& call) {
  CombineRequest request = impl().checkedOrRefused(Operation::combine, [&] {
    validateCall(impl().facts, call);
    impl().backend().beginCall(call);
    return validateCombine(impl().facts, inputs, handle, outputs);
  });
  request.call = call;
  impl().backend().combine(request);
}

PendingReceive Buffer::lowLatencyDispatch(const LowLatencyDispatchInputs& inputs,
                                          const LowLatencyDispatchOptions& options,
                                          const LowLatencyDispatchOutputs& outputs,
                                          const CallOptions& call) {
  auto request = impl().checkedOrRefused(Operation::lowLatencyDispatch, [&] {
    validateCall(impl().facts, call);
    impl().backend().beginCall(call);
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
  auto request = impl().checkedOrRefused(Operation::lowLatencyCombine, [&] {
    validateCall(impl().facts, call);
    impl().backend().beginCall(call);
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

Tensor Buffer::empty(std::span<const std::int64_t> shape, DataType dtype) {
  return impl().allocate(shape, dtype, MemoryKind::arena);
}
Tensor Buffer::empty(std::initializer_list<std::int64_t> shape, DataType dtype) {
  return empty(std::span(shape.begin(), shape.size()), dtype);
}
Tensor Buffer::emptyLocal(std::span<const std::int64_t> shape, DataType dtype) {
  return impl().allocate(shape, dtype, MemoryKind::local);
}

void Buffer::check() { impl().backend().check(); }
void Buffer::freeze() { impl().backend().freeze(); }
BufferStats Buffer::stats() const { return impl().backend().stats(); }
bool Buffer::masked(int rank) const {
  checkRank(impl().facts, rank);
  return impl().backend().masked(rank);
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
