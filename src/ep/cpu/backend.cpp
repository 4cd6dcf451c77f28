// SPDX-License-Identifier: MIT
#include "core/backend.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <optional>

#include "core/agreement.hpp"
#include "core/check.hpp"
#include "cpu/combine.hpp"
#include "cpu/context.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/low_latency.hpp"
#include "cpu/rounds.hpp"
#include "transport/memory_limit.hpp"
#include "transport/shared_memory.hpp"
#include "transport/trace.hpp"

namespace mscclpp_ep {
namespace cpu {

namespace {

constexpr std::int64_t kMostInitialArenaBytes = std::int64_t{64} << 20;
// Two or three threads saturate the memory of most hosts; many more only wait for each other.
constexpr int kMostDefaultThreads = 16;

// The modes of a call, for Transport::enterCall.
constexpr std::uint32_t kHighThroughput = 1;
constexpr std::uint32_t kLowLatency = 2;

class CpuBackend final : public Backend, public std::enable_shared_from_this<CpuBackend> {
 public:
  CpuBackend(std::unique_ptr<Transport> transport, std::unique_ptr<Workers> workers,
             std::unique_ptr<Trace> trace, const BufferOptions& options, std::uint64_t bufferId)
      : transport_(std::move(transport)),
        mailbox_(*transport_, Lane::highThroughput, options.firstEpoch),
        arena_(*transport_,
               static_cast<std::size_t>(std::min(options.arenaBytes, kMostInitialArenaBytes)),
               static_cast<std::size_t>(options.maxArenaBytes)),
        workers_(std::move(workers)),
        trace_(std::move(trace)),
        context_{*transport_,
                 mailbox_,
                 arena_,
                 pool_,
                 *workers_,
                 rowKernels(),
                 stats_,
                 *trace_,
                 bufferId,
                 0,
                 Lane::highThroughput,
                 options.enableShrink,
                 options.integrityCheck},
        lanes_{{{context_, Lane::lowLatency0, options.firstEpoch},
                {context_, Lane::lowLatency1, options.firstEpoch}}},
        nextEpoch_(options.firstEpoch),
        nextLowLatencyEpoch_(options.firstEpoch) {}

  void getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                         const LayoutOutputs& outputs) override {
    refuseChild();
    countTokens(*workers_, topkIdx, placement, outputs);
  }

  std::unique_ptr<PendingState> beginDispatch(DispatchRequest request) override;
  DispatchHandle finishDispatch(PendingState& pending, const DispatchOutputs& outputs) override;
  void abandonDispatch(PendingState& pending, std::string_view why) override;
  void combine(const CombineRequest& request) override;
  std::shared_ptr<ReceiveState> lowLatencyDispatch(LowLatencyDispatchRequest request) override {
    return sendLowLatency("low-latency dispatch", Operation::lowLatencyDispatch, std::move(request),
                          sendLowLatencyDispatch);
  }
  std::shared_ptr<ReceiveState> lowLatencyCombine(LowLatencyCombineRequest request) override {
    return sendLowLatency("low-latency combine", Operation::lowLatencyCombine, std::move(request),
                          sendLowLatencyCombine);
  }
  void receive(ReceiveState& state) override;
  void refuse(Operation operation, std::string_view why) override;

  Tensor allocate(std::size_t bytes, MemoryKind kind) override;
  void check() override;
  bool masked(int rank) const override { return transport_->masked(rank); }
  void setMask(int rank, bool masked) override {
    requireUsable();
    EP_EXPECTS(masked || !begun_, "a rank is taken in between operations; finish the dispatch");
    EP_EXPECTS(masked || !(lanes_[0].busy || lanes_[1].busy),
               "a rank is taken in between operations; call the hooks first");
    transport_->setMask(rank, masked);
    if (masked) return;
    for (LowLatencyLane& lane : lanes_) lane.forgetReader(rank);
  }
  void freeze() override {
    requireUsable();
    arena_.freeze();
  }
  BufferStats stats() override;
  void destroy() override;

 private:
  friend struct CpuPending;

  /// Ends the operation in the trace with the call that ends it.
  struct TracedCall {
    ~TracedCall() {
      if (!backend.begun_) backend.trace_->endOperation();
    }
    CpuBackend& backend;
  };

  /// Runs one step of an operation. An error that every rank sees alike passes; any other ends the
  /// buffer, and the peers are told.
  template <typename Step>
  auto run(const char* operation, const Step& step);

  void beginEpoch(const char* operation);
  LowLatencyLane& nextLane() { return lanes_[nextLowLatencyEpoch_ % 2]; }
  void beginLowLatencyEpoch(const char* operation);
  void refuseLowLatency(LowLatencyLane& lane, Operation operation, std::string_view why);
  template <typename Request, typename Send>
  std::shared_ptr<ReceiveState> sendLowLatency(const char* name, Operation operation,
                                               Request request, const Send& send);
  void refuseChild() const;
  void requireUsable() const;
  void reportDropped(const DispatchPlan& plan);

  std::unique_ptr<Transport> transport_;
  Mailbox mailbox_;
  Arena arena_;
  HostPool pool_;
  std::unique_ptr<Workers> workers_;
  std::unique_ptr<Trace> trace_;
  BufferStats stats_;
  Context context_;
  std::array<LowLatencyLane, 2> lanes_;
  std::uint64_t nextEpoch_;
  std::uint64_t nextLowLatencyEpoch_;
  const pid_t process_ = ::getpid();
  bool begun_ = false;   ///< a dispatch is between its two calls
  std::string failure_;  ///< why the buffer can only be destroyed; empty if it can be used
  std::string dropped_;  ///< for the next check()
};

/// Refuses the rest of its dispatch if it dies unfinished.
struct CpuPending final : PendingState {
  ~CpuPending() override {
    const auto owner = backend.lock();
    if (finished || owner == nullptr) return;
    try {
      owner->abandonDispatch(*this, "the caller dropped the dispatch before it was finished");
    } catch (const std::exception&) {
      // Expected: the failure is kept by the backend, whose next call reports it.
    }
  }

  std::weak_ptr<CpuBackend> backend;
  DispatchPlan plan;
  bool finished = false;
};

template <typename Step>
auto CpuBackend::run(const char* operation, const Step& step) {
  requireUsable();
  const TracedCall traced{*this};
  const FloatingPointModes modes;
  try {
    return step();
  } catch (const OperationRefused& refused) {
    std::rethrow_exception(refused.error);
  } catch (const std::exception& error) {
    failure_ = error.what();
    transport_->giveUp();
    throw;
  } catch (...) {
    failure_ = cat(operation, " was interrupted");
    transport_->giveUp();
    throw;
  }
}

void CpuBackend::beginEpoch(const char* operation) {
  context_.epoch = nextEpoch_++;
  transport_->enterCall(kHighThroughput);
  transport_->beginOperation(operation, context_.epoch);
  trace_->beginOperation(operation, context_.epoch);
}

/// Memory and sockets are shared with a forked child, which would speak in its parent's name.
void CpuBackend::refuseChild() const {
  if (::getpid() == process_) return;
  throw SystemError(
      "the buffer was made before this process was forked; make buffers after fork, "
      "or start ranks by spawn");
}

/// After a failure a slow peer may still write to any block that was published to it.
void CpuBackend::requireUsable() const {
  refuseChild();
  if (failure_.empty()) return;
  throw PeerFailure(cat("the buffer failed before and can only be destroyed: ", failure_));
}

std::unique_ptr<PendingState> CpuBackend::beginDispatch(DispatchRequest request) {
  EP_EXPECTS(!begun_, "a dispatch was begun and is not finished; finish it first");
  const char* what = request.cached != nullptr ? "cached dispatch" : "dispatch";
  return run(what, [&]() -> std::unique_ptr<PendingState> {
    beginEpoch(what);
    auto pending = std::make_unique<CpuPending>();
    pending->finished = true;  // until the counts are exchanged there is nothing to abandon
    pending->plan = exchangeCounts(context_, request);
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

DispatchHandle CpuBackend::finishDispatch(PendingState& state, const DispatchOutputs& outputs) {
  auto& pending = static_cast<CpuPending&>(state);
  pending.finished = true;
  begun_ = false;
  return run("dispatch", [&] {
    DispatchHandle handle(moveRows(context_, pending.request, pending.plan, outputs));
    reportDropped(pending.plan);
    return handle;
  });
}

void CpuBackend::reportDropped(const DispatchPlan& plan) {
  if (plan.numRecv <= plan.numRows) return;
  dropped_ =
      cat("num_worst_tokens was ", plan.numRows, " in the dispatch of epoch ", context_.epoch,
          ", but ", plan.numRecv, " rows came; ", plan.numRecv - plan.numRows,
          " were dropped from the highest (source rank, token)");
}

void CpuBackend::abandonDispatch(PendingState& state, std::string_view why) {
  auto& pending = static_cast<CpuPending&>(state);
  if (pending.finished) return;
  pending.finished = true;
  begun_ = false;
  run("dispatch", [&] { abandonRows(context_, Verdict::rejected, why); });
}

void CpuBackend::combine(const CombineRequest& request) {
  EP_EXPECTS(!begun_, "a dispatch was begun and is not finished; finish it first");
  run("combine", [&] {
    beginEpoch("combine");
    combineRows(context_, request);
  });
}

void CpuBackend::beginLowLatencyEpoch(const char* operation) {
  LowLatencyLane& lane = nextLane();
  lane.context.epoch = nextLowLatencyEpoch_++;
  transport_->enterCall(kLowLatency);
  transport_->beginOperation(operation, lane.context.epoch);
  trace_->beginOperation(operation, lane.context.epoch);
}

template <typename Request, typename Send>
std::shared_ptr<ReceiveState> CpuBackend::sendLowLatency(const char* name, Operation operation,
                                                         Request request, const Send& send) {
  EP_EXPECTS(!begun_, "a dispatch was begun and is not finished; finish it first");
  LowLatencyLane& lane = nextLane();
  EP_EXPECTS(!lane.busy,
             "the low-latency operation before the last is sent and not received; call its hook "
             "first");
  return run(name, [&]() -> std::shared_ptr<ReceiveState> {
    beginLowLatencyEpoch(name);
    lane.awaitReaders();
    try {
      std::shared_ptr<LowLatencyReceive> sent = send(lane, std::move(request));
      lane.busy = true;
      return sent;
    } catch (const SystemError& error) {
      // There was no memory to send from: nothing has been said yet.
      refuseLowLatency(lane, operation, error.what());
      throw OperationRefused{std::current_exception()};
    } catch (const OperationRefused&) {
      lane.raiseRead();
      throw;
    }
  });
}

void CpuBackend::receive(ReceiveState& state) {
  auto& pending = static_cast<LowLatencyReceive&>(state);
  pending.received = true;
  pending.lane.busy = false;
  run(pending.name(), [&] {
    transport_->beginOperation(pending.name(), pending.epoch);
    trace_->beginOperation(pending.name(), pending.epoch);
    try {
      pending.receive();
      // A rank that gave up may have let its memory be overwritten, also what was read already.
      pending.lane.context.requireNobodyGaveUp();
    } catch (const OperationRefused&) {
      pending.lane.raiseRead();
      throw;
    }
    pending.lane.raiseRead();
  });
}

void CpuBackend::refuseLowLatency(LowLatencyLane& lane, Operation operation, std::string_view why) {
  postRefusal(lane.context, operation, why);
  lane.raiseRead();
}

void CpuBackend::refuse(Operation operation, std::string_view why) {
  if (operation >= Operation::lowLatencyDispatch) {
    EP_EXPECTS(!nextLane().busy,
               "the low-latency operation before the last is sent and not received");
    return run(name(operation), [&] {
      LowLatencyLane& lane = nextLane();
      beginLowLatencyEpoch(name(operation));
      refuseLowLatency(lane, operation, why);
    });
  }
  EP_EXPECTS(!begun_, "a dispatch was begun and is not finished; finish it first");
  run(name(operation), [&] {
    beginEpoch(name(operation));
    postRefusal(context_, operation, why);
  });
}

Tensor CpuBackend::allocate(std::size_t bytes, MemoryKind kind) {
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
  auto block = pool_.allocate(bytes);
  tensor.view.data = block.get();
  tensor.owner = std::move(block);
  return tensor;
}

void CpuBackend::check() {
  if (!failure_.empty()) throw PeerFailure(failure_);
  const std::string dropped = std::exchange(dropped_, {});
  EP_EXPECTS(dropped.empty(), dropped);
}

BufferStats CpuBackend::stats() {
  BufferStats stats = stats_;
  stats.arenaBytes = static_cast<std::int64_t>(arena_.totalBytes());
  stats.heldBytes = static_cast<std::int64_t>(arena_.usedBytes());
  stats.landingBytes = static_cast<std::int64_t>(arena_.landingBytes());
  stats.pooledBytes = pool_.bytes();
  return stats;
}

void CpuBackend::destroy() {
  // In a forked child, or after a failure, there is nobody to wait for.
  if (::getpid() != process_ || !failure_.empty()) return;
  if (begun_) {
    run("dispatch", [&] {
      abandonRows(context_, Verdict::rejected, "it destroyed its buffer before it had finished");
    });
  }
  transport_->leave();
}

/// Off if no file is named. A rank that is refused makes none.
std::unique_ptr<Trace> openTrace(BufferOptions& options, const Bootstrap& bootstrap,
                                 std::uint64_t bufferId) {
  const char* fromEnvironment = std::getenv("MSCCLPP_EP_TRACE");
  if (options.trace.empty() && fromEnvironment != nullptr) options.trace = fromEnvironment;
  if (options.trace.empty()) return std::make_unique<Trace>();
  return std::make_unique<Trace>(options.trace, bootstrap.rank(), bootstrap.size(), bufferId);
}

}  // namespace
}  // namespace cpu

std::shared_ptr<Backend> makeCpuBackend(Bootstrap& bootstrap, const Admission& admission,
                                        BufferOptions& options, std::uint64_t bufferId) {
  const int ranks = bootstrap.size();
  SharedMemoryOptions transportOptions;
  transportOptions.connect.refusal = admission.refusal;
  transportOptions.connect.fingerprint = admission.fingerprint;
  transportOptions.connect.timeout = options.timeout;
  transportOptions.connect.pollInterrupt = options.pollInterrupt;
  transportOptions.shrink = options.enableShrink;
  if (options.maxArenaBytes == 0) options.maxArenaBytes = availableMemory() / 2 / ranks;
  if (options.numThreads == 0) {
    options.numThreads = std::clamp(coresAvailable() / ranks, 1, cpu::kMostDefaultThreads);
  }
  options.ranksPerDomain = ranks;

  std::unique_ptr<cpu::Workers> workers;
  auto trace = std::make_unique<Trace>();
  std::exception_ptr failure;
  try {
    workers = std::make_unique<cpu::Workers>(options.numThreads);
    if (admission.refusal.empty()) trace = cpu::openTrace(options, bootstrap, bufferId);
  } catch (const Error& error) {
    failure = std::current_exception();
    transportOptions.connect.refusal = error.what();
  }
  std::unique_ptr<Transport> transport;
  try {
    transport = std::make_unique<SharedMemory>(bootstrap, std::move(transportOptions));
  } catch (const Error&) {
    if (failure != nullptr) std::rethrow_exception(failure);
    throw;
  }
  return std::make_shared<cpu::CpuBackend>(std::move(transport), std::move(workers),
                                           std::move(trace), options, bufferId);
}

}  // namespace mscclpp_ep
