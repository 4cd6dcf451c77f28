// SPDX-License-Identifier: MIT
#include "host/backend.hpp"

#include <unistd.h>

#include <cstdlib>

#include "host/rounds.hpp"

namespace mscclpp_ep {

/// Refuses the rest of its dispatch if it dies unfinished.
struct HostPending final : PendingState {
  ~HostPending() override {
    const auto owner = backend.lock();
    if (finished || owner == nullptr) return;
    try {
      owner->abandonDispatch(*this, "the caller dropped the dispatch before it was finished");
    } catch (const std::exception&) {
      // Expected: the failure is kept by the backend, whose next call reports it.
    }
  }

  std::weak_ptr<HostBackend> backend;
  DispatchPlan plan;
  bool finished = false;
};

HostBackend::HostBackend(std::unique_ptr<Transport> transport, std::unique_ptr<Trace> trace,
                         const BufferOptions& options, std::size_t initialArenaBytes,
                         std::uint64_t bufferId, MakeFence makeFence)
    : transport_(std::move(transport)),
      mailbox_(*transport_, Lane::highThroughput, options.firstEpoch),
      arena_(*transport_, initialArenaBytes, static_cast<std::size_t>(options.maxArenaBytes),
             std::move(makeFence)),
      trace_(std::move(trace)),
      context_{*transport_,
               mailbox_,
               arena_,
               stats_,
               *trace_,
               bufferId,
               0,
               Lane::highThroughput,
               options.enableShrink,
               options.integrityCheck},
      nextEpoch_(options.firstEpoch),
      process_(::getpid()) {}

void HostBackend::fail(std::string why) {
  failure_ = std::move(why);
  transport_->giveUp();
  abort();
}

void HostBackend::enter(Mode mode, const char* operation, std::uint64_t epoch) {
  transport_->enterCall(static_cast<std::uint32_t>(mode));
  transport_->beginOperation(operation, epoch);
  trace_->beginOperation(operation, epoch);
}

void HostBackend::beginEpoch(const char* operation) {
  context_.epoch = nextEpoch_++;
  enter(Mode::highThroughput, operation, context_.epoch);
}

bool HostBackend::inChild() const { return ::getpid() != process_; }

/// Memory and sockets are shared with a forked child, which would speak in its parent's name.
void HostBackend::refuseChild() const {
  if (!inChild()) return;
  throw SystemError(
      "the buffer was made before this process was forked; make buffers after fork, "
      "or start ranks by spawn");
}

/// After a failure a slow peer may still write to any block that was published to it.
void HostBackend::requireUsable() {
  refuseChild();
  if (usable()) {
    try {
      return notice();
    } catch (const Error& error) {
      fail(error.what());
      throw;
    }
  }
  throw PeerFailure(cat("the buffer failed before and can only be destroyed: ", failure_));
}

void HostBackend::requireNoDispatch() const {
  EP_EXPECTS(!begun_, "a dispatch was begun and is not finished; finish it first");
}

std::unique_ptr<PendingState> HostBackend::beginDispatch(DispatchRequest request) {
  requireNoDispatch();
  const char* what = request.cached != nullptr ? "cached dispatch" : "dispatch";
  return run(what, [&]() -> std::unique_ptr<PendingState> {
    beginEpoch(what);
    auto pending = std::make_unique<HostPending>();
    pending->finished = true;  // until the counts are exchanged there is nothing to abandon
    pending->plan = enterDispatch(request);
    pending->backend = weak_from_this();
    pending->bufferId = context_.bufferId;
    pending->numRows = pending->plan.numRows;
    if (request.cached == nullptr && request.options.numWorstTokens == 0) {
      for (const std::int64_t count : pending->plan.perExpert) {
        pending->alignedPerExpert.push_back(roundUp(count, request.options.expertAlignment));
      }
    }
    pending->request = std::move(request);
    pending->finished = false;
    begun_ = true;
    return pending;
  });
}

DispatchPlan HostBackend::enterDispatch(DispatchRequest& request) {
  try {
    return exchangeCounts(context_, request,
                          [&](DispatchPlan& plan) { receiveCounts(request, plan); });
  } catch (const OperationRefused&) {
    // Whatever others have done wrong, a rank is told its own mistake.
    try {
      requireSound(request);
    } catch (const InvalidArgument&) {
      throw OperationRefused{std::current_exception()};
    }
    throw;
  }
}

/// The others hear of it when they are to be told where rows go.
void HostBackend::refuseUnsound(const DispatchRequest& request) {
  try {
    requireSound(request);
  } catch (const InvalidArgument& error) {
    abandonRows(context_, Verdict::rejected, error.what());
    throw OperationRefused{std::current_exception()};
  }
}

DispatchHandle HostBackend::finishDispatch(PendingState& state, const DispatchOutputs& outputs) {
  auto& pending = static_cast<HostPending&>(state);
  pending.finished = true;
  begun_ = false;
  return run("dispatch", [&] {
    refuseUnsound(pending.request);
    DispatchHandle handle(moveRows(pending.request, pending.plan, outputs));
    reportDropped(pending.plan);
    return handle;
  });
}

void HostBackend::reportDropped(const DispatchPlan& plan) {
  if (plan.numRecv <= plan.numRows) return;
  dropped_ =
      cat("num_worst_tokens was ", plan.numRows, " in the dispatch of epoch ", context_.epoch,
          ", but ", plan.numRecv, " rows came; ", plan.numRecv - plan.numRows,
          " were dropped from the highest (source rank, token)");
}

void HostBackend::abandonDispatch(PendingState& state, std::string_view why) {
  auto& pending = static_cast<HostPending&>(state);
  if (pending.finished) return;
  pending.finished = true;
  begun_ = false;
  run("dispatch", [&] { abandonRows(context_, Verdict::rejected, why); });
}

void HostBackend::combine(const CombineRequest& request) {
  requireNoDispatch();
  run("combine", [&] {
    beginEpoch("combine");
    combineRows(request);
  });
}

void HostBackend::refuse(Operation operation, std::string_view why) {
  requireNoDispatch();
  run(name(operation), [&] {
    beginEpoch(name(operation));
    postRefusal(context_, operation, why);
  });
}

Tensor HostBackend::allocate(std::size_t bytes, MemoryKind kind, Stream stream) {
  requireUsable();
  Tensor tensor;
  if (kind == MemoryKind::arena) {
    if (auto block = arena_.allocate(bytes)) {
      tensor.inArena = true;
      tensor.view.data = block->data.get();
      tensor.owner = std::move(block->data);
      return tensor;
    }
  }
  auto block = allocateOrdinary(bytes, stream);
  tensor.view.data = block.get();
  tensor.owner = std::move(block);
  return tensor;
}

void HostBackend::check() {
  if (!failure_.empty()) throw PeerFailure(failure_);
  const std::string dropped = std::exchange(dropped_, {});
  EP_EXPECTS(dropped.empty(), dropped);
}

void HostBackend::setMask(int rank, bool masked) {
  requireUsable();
  EP_EXPECTS(masked || !begun_, "a rank is taken in between operations; finish the dispatch");
  transport_->setMask(rank, masked);
}

void HostBackend::freeze() {
  requireUsable();
  arena_.freeze();
}

BufferStats HostBackend::stats() {
  BufferStats stats = stats_;
  stats.arenaBytes = static_cast<std::int64_t>(arena_.totalBytes());
  stats.heldBytes = static_cast<std::int64_t>(arena_.usedBytes());
  stats.landingBytes = static_cast<std::int64_t>(arena_.landingBytes());
  stats.pooledBytes = ordinaryBytes();
  return stats;
}

void HostBackend::destroy() {
  // In a forked child, or after a failure, there is nobody to wait for.
  if (inChild() || !usable()) return;
  if (begun_) {
    run("dispatch", [&] {
      abandonRows(context_, Verdict::rejected, "it destroyed its buffer before it had finished");
    });
  }
  requireUsable();
  settle();
  transport_->leave();
  left_ = true;
}

std::unique_ptr<Trace> openTrace(BufferOptions& options, const Bootstrap& bootstrap,
                                 std::uint64_t bufferId) {
  const char* fromEnvironment = std::getenv("MSCCLPP_EP_TRACE");
  if (options.trace.empty() && fromEnvironment != nullptr) options.trace = fromEnvironment;
  if (options.trace.empty()) return std::make_unique<Trace>();
  return std::make_unique<Trace>(options.trace, bootstrap.rank(), bootstrap.size(), bufferId);
}

SharedMemoryOptions transportOptions(const Admission& admission, const BufferOptions& options) {
  SharedMemoryOptions result;
  result.connect.refusal = admission.refusal;
  result.connect.fingerprint = admission.fingerprint;
  result.connect.timeout = options.timeout;
  result.connect.pollInterrupt = options.pollInterrupt;
  result.shrink = options.enableShrink;
  return result;
}

}  // namespace mscclpp_ep
