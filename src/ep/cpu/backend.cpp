// SPDX-License-Identifier: MIT
#include "host/backend.hpp"

#include <algorithm>
#include <array>
#include <exception>

#include "cpu/combine.hpp"
#include "cpu/context.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/low_latency.hpp"
#include "host/rounds.hpp"
#include "transport/memory_limit.hpp"

namespace mscclpp_ep {
namespace cpu {

namespace {

constexpr std::int64_t kMostInitialArenaBytes = std::int64_t{64} << 20;
// Two or three threads saturate the memory of most hosts; many more only wait for each other.
constexpr int kMostDefaultThreads = 16;

class CpuBackend final : public HostBackend {
 public:
  CpuBackend(std::unique_ptr<Transport> transport, std::unique_ptr<Workers> workers,
             std::unique_ptr<Trace> trace, const BufferOptions& options, std::uint64_t bufferId)
      : HostBackend(std::move(transport), std::move(trace), options,
                    static_cast<std::size_t>(std::min(options.arenaBytes, kMostInitialArenaBytes)),
                    bufferId),
        workers_(std::move(workers)),
        lanes_{{{context(), Lane::lowLatency0, options.firstEpoch},
                {context(), Lane::lowLatency1, options.firstEpoch}}},
        nextLowLatencyEpoch_(options.firstEpoch) {}

  void examineRouting(DispatchRequest& request) override {
    request.routing = readRouting(request.inputs, *request.placement);
  }
  void getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                         const LayoutOutputs& outputs) override {
    refuseChild();
    countTokens(*workers_, topkIdx, placement, outputs);
  }

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
  void setMask(int rank, bool masked) override {
    requireUsable();
    EP_EXPECTS(masked || !(lanes_[0].busy || lanes_[1].busy),
               "a rank is taken in between operations; call the hooks first");
    HostBackend::setMask(rank, masked);
    if (masked) return;
    for (LowLatencyLane& lane : lanes_) lane.forgetReader(rank);
  }

 private:
  std::shared_ptr<const HandleState> moveRows(const DispatchRequest& request,
                                              const DispatchPlan& plan,
                                              const DispatchOutputs& outputs) override {
    Context now = context();
    return cpu::moveRows(now, request, plan, outputs);
  }
  void combineRows(const CombineRequest& request) override {
    const FloatingPointModes modes;
    Context now = context();
    cpu::combineRows(now, request);
  }
  std::shared_ptr<std::byte> allocateOrdinary(std::size_t bytes, Stream) override {
    return pool_.allocate(bytes);
  }
  std::int64_t ordinaryBytes() override { return pool_.bytes(); }

  Context context() { return {context_, {pool_, *workers_, rowKernels()}}; }

  LowLatencyLane& nextLane() { return lanes_[nextLowLatencyEpoch_ % 2]; }
  void beginLowLatencyEpoch(const char* operation);
  void refuseLowLatency(LowLatencyLane& lane, Operation operation, std::string_view why);
  template <typename Request, typename Send>
  std::shared_ptr<ReceiveState> sendLowLatency(const char* name, Operation operation,
                                               Request request, const Send& send);

  HostPool pool_;
  std::unique_ptr<Workers> workers_;
  std::array<LowLatencyLane, 2> lanes_;
  std::uint64_t nextLowLatencyEpoch_;
};

void CpuBackend::beginLowLatencyEpoch(const char* operation) {
  LowLatencyLane& lane = nextLane();
  lane.context.epoch = nextLowLatencyEpoch_++;
  enter(Mode::lowLatency, operation, lane.context.epoch);
}

template <typename Request, typename Send>
std::shared_ptr<ReceiveState> CpuBackend::sendLowLatency(const char* name, Operation operation,
                                                         Request request, const Send& send) {
  requireNoDispatch();
  LowLatencyLane& lane = nextLane();
  EP_EXPECTS(!lane.busy,
             "the low-latency operation before the last is sent and not received; call its hook "
             "first");
  return run(name, [&]() -> std::shared_ptr<ReceiveState> {
    const FloatingPointModes modes;
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
    const FloatingPointModes modes;
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
  if (operation < Operation::lowLatencyDispatch) return HostBackend::refuse(operation, why);
  EP_EXPECTS(!nextLane().busy,
             "the low-latency operation before the last is sent and not received");
  run(name(operation), [&] {
    LowLatencyLane& lane = nextLane();
    beginLowLatencyEpoch(name(operation));
    refuseLowLatency(lane, operation, why);
  });
}

}  // namespace
}  // namespace cpu

std::shared_ptr<Backend> makeCpuBackend(Bootstrap& bootstrap, const Admission& admission,
                                        BufferOptions& options, std::uint64_t bufferId) {
  const int ranks = bootstrap.size();
  SharedMemoryOptions connecting = transportOptions(admission, options);
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
    if (admission.refusal.empty()) trace = openTrace(options, bootstrap, bufferId);
  } catch (const Error& error) {
    failure = std::current_exception();
    connecting.connect.refusal = error.what();
  }
  std::unique_ptr<Transport> transport;
  try {
    transport = std::make_unique<SharedMemory>(bootstrap, std::move(connecting));
  } catch (const Error&) {
    if (failure != nullptr) std::rethrow_exception(failure);
    throw;
  }
  return std::make_shared<cpu::CpuBackend>(std::move(transport), std::move(workers),
                                           std::move(trace), options, bufferId);
}

}  // namespace mscclpp_ep
