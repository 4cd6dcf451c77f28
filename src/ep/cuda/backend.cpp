// SPDX-License-Identifier: MIT
#include "host/backend.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>

#include "cuda/await.hpp"
#include "cuda/combine.hpp"
#include "cuda/count_boards.hpp"
#include "cuda/diagnostics.hpp"
#include "cuda/dispatch.hpp"
#include "cuda/kernel_list.hpp"
#include "cuda/losses.hpp"
#include "cuda/peer_order.hpp"
#include "cuda/placement.hpp"
#include "cuda/plan_report.hpp"
#include "cuda/routing.hpp"
#include "host/told_counts.hpp"
#include "mscclpp_ep/diagnostics.hpp"
#include "mscclpp_ep/event.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep {
namespace cuda {

namespace {

/// Those of DeepEP, which leave most of the GPU to the model.
constexpr int kDefaultSms = 20;

/// How long a rank that leaves waits for its kernels.
constexpr std::chrono::seconds kMostBriefly{5};

cudaStream_t handleOf(Stream stream) { return static_cast<cudaStream_t>(stream.handle()); }

/// Memory behind it is used again only when it is known what ranks that are lost may write to.
class LearningFence final : public Fence {
 public:
  LearningFence(std::unique_ptr<Fence> fence, Losses& losses)
      : fence_(std::move(fence)), losses_(losses) {}
  bool passed() override {
    if (!fence_->passed()) return false;
    losses_.learn();
    return true;
  }

 private:
  std::unique_ptr<Fence> fence_;
  Losses& losses_;
};

/// By what the kernels of the ranks find each other.
struct Connected {
  std::unique_ptr<PeerOrder> order;
  std::unique_ptr<CountBoards> boards;
};

/// What the backend owns that its base works with, and that must therefore be there first.
struct Resources {
  Resources(Connected connected, int gpu)
      : device(gpu), peerOrder(std::move(connected.order)), boards(std::move(connected.boards)) {}

  const int device;

  OwnedStream stream;
  UserStreams users{stream.get()};
  std::unique_ptr<PeerOrder> peerOrder;
  std::unique_ptr<CountBoards> boards;
  std::unique_ptr<Losses> losses;  ///< of a buffer that goes on without ranks

  /// Of use at any time, also outside of calls.
  MakeFence makeFence() {
    return [this]() -> std::unique_ptr<Fence> {
      const CurrentDevice current(device);
      users.lookForCapture();
      auto fence = users.fence();
      if (losses == nullptr || fence == nullptr) return fence;
      return std::make_unique<LearningFence>(std::move(fence), *losses);
    };
  }
};

int multiprocessors(int device) {
  int count = 0;
  EP_CUDA_TRY(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
              "cannot tell what GPU ", device, " is");
  return count;
}

/// Rows in the memory of a GPU. The hosts of the ranks agree on each operation and exchange
/// addresses; what moves rows, and waits for other ranks to have moved theirs, are kernels.
class CudaBackend final : private Resources, public HostBackend {
 public:
  CudaBackend(std::unique_ptr<Transport> transport, Connected connected,
              std::unique_ptr<Trace> trace, const BufferOptions& options, std::uint64_t bufferId)
      : Resources(std::move(connected), options.device.index),
        HostBackend(std::move(transport), std::move(trace), options,
                    static_cast<std::size_t>(options.arenaBytes), bufferId, makeFence()),
        deviceSms_(multiprocessors(options.device.index)),
        smMargin_(options.smMargin),
        briefly_(std::min<std::chrono::duration<double>>(kMostBriefly, options.timeout / 2)),
        pollInterrupt_([this, poll = options.pollInterrupt] {
          if (losses != nullptr) losses->watch();
          if (poll) poll();
        }),
        pool_(makeFence()) {
    const CurrentDevice current(device);
    nextChunk_.write({0});
    if (!options.enableShrink) return;
    losses = std::make_unique<Losses>(*peerOrder, *transport_, arena_);
    users.beStrict();
  }
  ~CudaBackend() override;

  void beginCall(const CallOptions& call) override;
  void endCall(const CallOptions& call) override;
  void examineRouting(DispatchRequest& request) override;
  void getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                         const LayoutOutputs& outputs) override;
  // Arguments are checked before, and refused: the ranks agree on that without a word.
  std::shared_ptr<ReceiveState> lowLatencyDispatch(LowLatencyDispatchRequest) override {
    return nullptr;
  }
  std::shared_ptr<ReceiveState> lowLatencyCombine(LowLatencyCombineRequest) override {
    return nullptr;
  }
  void receive(ReceiveState&) override {}
  void refuse(Operation operation, std::string_view why) override {
    if (operation < Operation::lowLatencyDispatch) HostBackend::refuse(operation, why);
  }
  Tensor allocate(std::size_t bytes, MemoryKind kind, Stream user) override;
  std::vector<std::int64_t> readCounts(const HandleState& handle) override;
  std::vector<double> timePush(std::size_t bytes, int numSms, int repeats) override;
  void recordStream(Stream user) override { users.add(handleOf(user)); }
  void forgetStream(Stream user) override {
    const CurrentDevice current(device);
    users.lookForCapture();
    if (users.capturing()) return;
    callOrder_.join();
    orderStreams(handleOf(user), stream.get());
    users.remove(handleOf(user));
  }
  Stream commStream() const override { return Stream(stream.get()); }
  void check() override;
  bool masked(int rank) override;
  void setMask(int rank, bool masked) override;
  void store(const TensorView& out, const std::vector<std::int32_t>& values, Stream user) override {
    if (out.device.type == DeviceType::cpu) return HostBackend::store(out, values, user);
    const CurrentDevice current(device);
    storeValues(static_cast<std::int32_t*>(out.data), values.data(),
                static_cast<std::int64_t>(values.size()), handleOf(user));
  }

 private:
  std::shared_ptr<const HandleState> moveRows(const DispatchRequest& request,
                                              const DispatchPlan& plan,
                                              const DispatchOutputs& outputs) override {
    const CurrentDevice current(device);
    callOrder_.join();
    Context now = context(request.call);
    return cuda::moveRows(now, placements_.get(*request.placement), request, plan, outputs);
  }
  void combineRows(const CombineRequest& request) override {
    const CurrentDevice current(device);
    callOrder_.join();
    Context now = context(request.call);
    cuda::combineRows(now, request);
  }
  std::shared_ptr<std::byte> allocateOrdinary(std::size_t bytes, Stream) override {
    const CurrentDevice current(device);
    return pool_.allocate(bytes);
  }
  std::int64_t ordinaryBytes() override { return pool_.bytes(); }
  void receiveCounts(DispatchRequest& request, DispatchPlan& plan) override {
    const CurrentDevice current(device);
    cuda::awaitCounts(context(request.call), reporter_, request);
    receiveToldCounts(context_, request.placement->numLocal(context_.rank()), plan);
  }
  void requireSound(const DispatchRequest& request) override {
    if (request.cached != nullptr || !request.countsOnHost()) return;
    const CurrentDevice current(device);
    verifyRouting(context(request.call), reporter_, request);
  }
  void notice() override {
    peerOrder->throwIfFailed();
    if (losses == nullptr) return;
    const CurrentDevice current(device);
    losses->learn();
  }
  void abort() noexcept override { peerOrder->abort(); }
  void settle() override;
  void awaitStream() const;
  void awaitBriefly() const noexcept;
  bool isCallersOnly() const;
  bool canPlanOnCallers(const CallOptions& call) const;
  void freeDropped();

  Context context(const CallOptions& call) {
    return {context_,
            {device, pool_, stream.get(), isCaptured(), orderNow(), reporter_.notice(),
             reporter_.hostCounts(), flags_, packets_, nextChunk_.get(), pollInterrupt_,
             smsFor(call), losses.get()}};
  }

  /// Whether the stream of operations is, which it never is alone.
  bool isCaptured() const { return users.capturing().has_value() && isCapturing(stream.get()); }

  Order orderNow() const {
    Order order = peerOrder->arguments();
    constexpr std::uint32_t kNotZero = 1U << 31;
    if (losses != nullptr) order.operation = static_cast<std::uint32_t>(context_.epoch) | kNotZero;
    return order;
  }

  /// The kernels of ranks that share the GPU wait for each other, and must all fit on it.
  int smsFor(const CallOptions& call) const {
    const int wanted = call.numSms > 0 ? call.numSms : kDefaultSms;
    return std::clamp(wanted, 1, std::max((deviceSms_ - smMargin_) / ranksOnDevice(device), 1));
  }

  const int deviceSms_;
  const int smMargin_;
  const std::chrono::duration<double> briefly_;  ///< hosts of others wait no longer than `timeout`
  const std::function<void()> pollInterrupt_;
  DevicePool pool_;
  PlanReporter reporter_;
  DevicePlacements placements_;
  PeerMemory flags_{peerOrder->flags(), PeerOrder::kFlagBytes};
  PeerMemory packets_{peerOrder->packets(), PeerOrder::kPacketBytes};
  DeviceArray<std::uint64_t> nextChunk_{1};
  CallOrder callOrder_{stream.get()};
};

/// Lets end what this rank has enqueued: other ranks, which may be late, have their part in it.
void CudaBackend::awaitBriefly() const noexcept {
  constexpr std::chrono::milliseconds kPeriod{1};
  const auto end = std::chrono::steady_clock::now() + briefly_;
  try {
    for (const auto& event : users.ends()) {
      while (!event->passed() && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(kPeriod);
      }
    }
  } catch (const std::exception&) {
    // Expected: at the end of a process, a GPU that cannot be asked does nothing more.
  }
}

/// What this rank still waits for on the GPU ends, and with it what it reads and writes.
CudaBackend::~CudaBackend() {
  if (inChild()) return;
  const RelaxedCapture relaxed;
  int before = 0;
  (void)cudaGetDevice(&before);
  (void)cudaSetDevice(device);
  if (!left()) {
    if (usable()) awaitBriefly();
    transport_->giveUp();
  }
  peerOrder->abort();
  (void)cudaStreamSynchronize(stream.get());
  (void)cudaSetDevice(before);
  (void)cudaGetLastError();
}

void CudaBackend::beginCall(const CallOptions& call) {
  requireUsable();
  const CurrentDevice current(device);
  users.add(handleOf(call.stream));
  users.allowWaiting(!call.previous.has_value());
  callOrder_.joinIfBegun();  // a dispatch is begun and not finished
  if (call.previous) {
    call.previous->wait(commStream());
  } else {
    callOrder_.begin(handleOf(call.stream));
  }
  users.lookForCapture();
  if (users.capturing() && callOrder_.toJoin()) {
    callOrder_.join();
    users.lookForCapture();  // of which graph the operations are a part
  }
  freeDropped();
  if (!users.capturing()) buryDead();
  transport_->keepUnshared(users.capturing().has_value());
  // Between the calls of a dispatch it is what the ranks have agreed on.
  if (losses == nullptr || begun_) return;
  if (losses->aligns() && !users.capturing()) awaitStream();
  context_.gpuEpoch = losses->epochToTell();
}

/// Whether memory is used by the caller's stream only, behind which the stream of operations is
/// about to be: and not by ranks that were lost.
bool CudaBackend::isCallersOnly() const {
  const auto callers = callOrder_.toJoin();
  return losses == nullptr && callers && !users.capturing() && users.areOnly(*callers);
}

void CudaBackend::freeDropped() {
  if (!isCallersOnly()) return;
  arena_.freeDropped();
  pool_.freeDropped();
}

/// If the caller's stream is behind all operations, a plan can come next on it, and the streams be
/// ordered while the GPU is at work. A stream that others may have this handle of, or of which a
/// graph may be running, is not known to be behind.
bool CudaBackend::canPlanOnCallers(const CallOptions& call) const {
  return !call.async && isCallersOnly() && callOrder_.callersIsBehind() && !users.everCaptured();
}

void CudaBackend::endCall(const CallOptions& call) {
  const CurrentDevice current(device);
  callOrder_.join();
  if (call.async) return;
  callOrder_.end(handleOf(call.stream));
  // What a graph orders is so only where it runs.
  if (users.capturing()) callOrder_.forget();
}

void CudaBackend::examineRouting(DispatchRequest& request) {
  requireNoDispatch();  // whose plan is the last one, until it is finished
  const CurrentDevice current(device);
  const bool onCallers = canPlanOnCallers(request.call);
  if (!onCallers) callOrder_.join();
  Context now = context(request.call);
  if (onCallers) now.stream = handleOf(request.call.stream);
  const bool fits = fitToldCounts(*request.placement, context_.size());
  cuda::examineRouting(now, reporter_, placements_.get(*request.placement), request,
                       fits ? boards.get() : nullptr, nextEpoch());
  callOrder_.join();
  const bool hostWaits = request.options.numWorstTokens == 0;
  if (hostWaits && !request.routing.countsFollow) cuda::awaitCounts(now, reporter_, request);
}

Tensor CudaBackend::allocate(std::size_t bytes, MemoryKind kind, Stream user) {
  const CurrentDevice current(device);
  if (user.given()) users.add(handleOf(user));
  // Between the calls of a dispatch it is known.
  if (!begun_) users.lookForCapture();
  Tensor tensor = HostBackend::allocate(bytes, kind, user);
  if (const auto capturing = users.capturing()) {
    keepWithGraph(*capturing, tensor.owner);
  } else if (user.given()) {
    // Free memory is free for what comes on the stream of operations.
    callOrder_.joinIfBegun();
    orderStreams(stream.get(), handleOf(user));
  }
  return tensor;
}

std::vector<std::int64_t> CudaBackend::readCounts(const HandleState& handle) {
  requireUsable();
  const CurrentDevice current(device);
  settle();
  const DeviceRouting& routing = deviceRouting(handle.onGpu);
  std::vector<std::int32_t> counts(static_cast<std::size_t>(1 + routing.numLocalExperts));
  const CountsMap map(context_.size(), routing.numLocalExperts);
  const auto copy = [&](std::int32_t* out, std::int64_t at, std::int64_t count) {
    EP_CUDA_TRY(
        cudaMemcpy(out, routing.count(at), static_cast<std::size_t>(count) * sizeof(std::int32_t),
                   cudaMemcpyDeviceToHost),
        "cannot read the counts of a handle");
  };
  copy(counts.data(), map.numRecv(), 1);
  copy(counts.data() + 1, map.perExpert(), routing.numLocalExperts);
  return {counts.begin(), counts.end()};
}

void CudaBackend::awaitStream() const {
  const char* what = "work of the buffer failed on the GPU";
  if (losses != nullptr) {
    awaitWatching([&] { return isDone(cudaStreamQuery(stream.get()), what); }, pollInterrupt_);
  }
  EP_CUDA_TRY(cudaStreamSynchronize(stream.get()), what);
  // Graphs run on streams of the caller's.
  if (users.everCaptured()) EP_CUDA_TRY(cudaDeviceSynchronize(), what);
}

void CudaBackend::settle() {
  const CurrentDevice current(device);
  awaitStream();
  requireUsable();  // of what the GPU has noticed by now
}

/// What kernels under way are about to lose counts.
bool CudaBackend::masked(int rank) {
  if (losses == nullptr || inChild()) return HostBackend::masked(rank);
  const CurrentDevice current(device);
  users.lookForCapture();
  if (!users.capturing()) awaitStream();
  losses->learn();
  return HostBackend::masked(rank);
}

void CudaBackend::setMask(int rank, bool masked) {
  requireUsable();
  const CurrentDevice current(device);
  users.lookForCapture();
  EP_EXPECTS(!users.capturing(), "a graph is captured; mask ranks, or take them in, before that");
  awaitStream();
  HostBackend::setMask(rank, masked);
  losses->set(rank, masked);
}

void CudaBackend::check() {
  requireUsable();
  settle();
  const Notice seen = std::exchange(*reporter_.notice(), {});
  EP_EXPECTS(seen.badPlace < 0, "topk_idx had ", seen.badId,
             ", which is no id of an expert and was taken as -1");
  EP_EXPECTS(seen.countsDiffer == 0,
             "num_tokens_per_rank or num_tokens_per_expert, given with num_worst_tokens, were not "
             "the counts of is_token_in_rank and topk_idx");
  EP_EXPECTS(seen.dropped == 0, "num_worst_tokens was ", seen.numRows, ", but ", seen.numRecv,
             " rows came; ", seen.numRecv - seen.numRows,
             " were dropped from the highest (source rank, token)");
  HostBackend::check();
}

void CudaBackend::getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                                    const LayoutOutputs& outputs) {
  requireUsable();
  const CurrentDevice current(device);
  callOrder_.join();
  CountArguments arguments;
  arguments.topk = {topkIdx.data, nullptr, topkIdx.shape[1], topkIdx.dtype == DataType::int64};
  arguments.owner = placements_.get(placement).owner;
  arguments.numTokens = topkIdx.shape[0];
  arguments.numExperts = placement.numExperts();
  arguments.numRanks = context_.size();
  arguments.perRank = static_cast<std::int32_t*>(outputs.numTokensPerRank.data);
  arguments.perExpert = static_cast<std::int32_t*>(outputs.numTokensPerExpert.data);
  arguments.inRank = static_cast<std::uint8_t*>(outputs.isTokenInRank.data);
  arguments.notice = reporter_.notice();
  countTokens(arguments, stream.get());
}

std::vector<double> CudaBackend::timePush(std::size_t bytes, int numSms, int repeats) {
  auto seconds = run("push", [&] {
    const CurrentDevice current(device);
    beginEpoch("push");
    CallOptions call;
    call.numSms = numSms;
    Context now = context(call);
    return cuda::timePush(now, bytes, repeats);
  });
  requireUsable();  // pushes that waited in vain took no time
  return seconds;
}

/// Lets the kernels of the ranks find each other. A rank that cannot comes to the barrier all the
/// same: the others learn that it has gone when they look for its memory.
Connected connectKernels(Bootstrap& bootstrap, Transport& transport, const BufferOptions& options) {
  Connected connected;
  std::exception_ptr failure;
  try {
    loadKernels();
    connected.order = std::make_unique<PeerOrder>(transport, options.firstEpoch, options.timeout,
                                                  options.enableShrink);
    connected.boards = std::make_unique<CountBoards>(transport);
  } catch (const Error&) {
    failure = std::current_exception();
  }
  bootstrap.barrier();
  if (failure != nullptr) std::rethrow_exception(failure);
  connected.order->connect(transport);
  return connected;
}

/// What this version cannot do on a GPU.
void requireSupported(const BufferOptions& options) {
  const int count = cudaDeviceCount();
  if (count == 0) {
    throw NotBuilt(
        "device is \"cuda\", but there is no GPU, or no driver for it; nvidia-smi tells");
  }
  EP_EXPECTS(options.device.index >= 0 && options.device.index < count, "device is ",
             toString(options.device), ", but there are ", count, " GPUs");
}

}  // namespace
}  // namespace cuda

std::shared_ptr<Backend> makeCudaBackend(Bootstrap& bootstrap, const Admission& admission,
                                         BufferOptions& options, std::uint64_t bufferId) {
  SharedMemoryOptions connecting = transportOptions(admission, options);
  auto trace = std::make_unique<Trace>();
  try {
    cuda::requireSupported(options);
    connecting.segments = cudaSegments(options.device.index, bootstrap.rank());
    if (options.maxArenaBytes == 0) {
      options.maxArenaBytes = connecting.segments->available() / 2 / bootstrap.size();
    }
    options.ranksPerDomain = bootstrap.size();
    // Kernels of a rank that this one waits for may be waiting for another one, twice.
    if (options.enableShrink) connecting.connect.timeout *= 3;
    trace = openTrace(options, bootstrap, bufferId);
  } catch (const Error& error) {
    declineToConnect(bootstrap, error.what());
    throw;
  }
  auto transport = std::make_unique<SharedMemory>(bootstrap, std::move(connecting));
  const CurrentDevice current(options.device.index);
  auto connected = cuda::connectKernels(bootstrap, *transport, options);
  return std::make_shared<cuda::CudaBackend>(std::move(transport), std::move(connected),
                                             std::move(trace), options, bufferId);
}

int cudaDeviceCount() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

bool isCudaBuilt() { return true; }

}  // namespace mscclpp_ep
