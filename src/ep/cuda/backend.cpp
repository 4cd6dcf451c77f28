// SPDX-License-Identifier: MIT
#include "host/backend.hpp"

#include <algorithm>

#include "cuda/combine.hpp"
#include "cuda/dispatch.hpp"
#include "cuda/placement.hpp"
#include "mscclpp_ep/diagnostics.hpp"
#include "mscclpp_ep/event.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep {
namespace cuda {

namespace {

/// Those of DeepEP, which leave most of the GPU to the model.
constexpr int kDefaultSms = 20;

/// Rows in the memory of a GPU. The ranks exchange counts and addresses on the host; kernels write
/// and read the memory of other ranks. A call returns with its outputs complete.
class CudaBackend final : public HostBackend {
 public:
  CudaBackend(std::unique_ptr<Transport> transport, std::unique_ptr<Trace> trace,
              const BufferOptions& options, std::uint64_t bufferId)
      : HostBackend(std::move(transport), std::move(trace), options,
                    static_cast<std::size_t>(options.arenaBytes), bufferId,
                    [device = options.device.index] {
                      const CurrentDevice current(device);
                      settle();
                    }),
        device_(options.device.index) {}

  void beginCall(const CallOptions& call) override;
  std::shared_ptr<const void> read(const TensorView& tensor) override;
  void getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                         const LayoutOutputs& outputs) override;
  // Arguments are checked before, and refused: the ranks agree on that without a word.
  std::shared_ptr<ReceiveState> lowLatencyDispatch(LowLatencyDispatchRequest) override {
    throw NotBuilt("low-latency operations on a GPU are not in this version");
  }
  std::shared_ptr<ReceiveState> lowLatencyCombine(LowLatencyCombineRequest) override {
    throw NotBuilt("low-latency operations on a GPU are not in this version");
  }
  void receive(ReceiveState&) override {}
  void refuse(Operation operation, std::string_view why) override {
    if (operation < Operation::lowLatencyDispatch) HostBackend::refuse(operation, why);
  }
  Stream commStream() const override { return Stream(stream_.get()); }

 private:
  std::shared_ptr<const HandleState> moveRows(const DispatchRequest& request,
                                              const DispatchPlan& plan,
                                              const DispatchOutputs& outputs) override {
    const CurrentDevice current(device_);
    Context now = context(request.call);
    const PlacementArrays placement = placement_.get(*request.placement, pool_, stream_.get());
    return cuda::moveRows(now, placement, request, plan, outputs);
  }
  void combineRows(const CombineRequest& request) override {
    const CurrentDevice current(device_);
    Context now = context(request.call);
    cuda::combineRows(now, request);
  }
  std::shared_ptr<std::byte> allocateOrdinary(std::size_t bytes) override {
    const CurrentDevice current(device_);
    return pool_.allocate(bytes);
  }
  std::int64_t ordinaryBytes() override { return pool_.bytes(); }

  Context context(const CallOptions& call) {
    return {context_, {device_, pool_, stream_, call.numSms > 0 ? call.numSms : kDefaultSms}};
  }

  const int device_;
  DevicePool pool_;
  OwnedStream stream_;
  DevicePlacement placement_;
};

void CudaBackend::beginCall(const CallOptions& call) {
  requireUsable();
  Event(call.stream, device_).wait(commStream());
}

std::shared_ptr<const void> CudaBackend::read(const TensorView& tensor) {
  const CurrentDevice current(device_);
  const auto copy = std::make_shared<std::vector<std::byte>>(numBytes(tensor));
  EP_CUDA_TRY(cudaMemcpyAsync(copy->data(), tensor.data, copy->size(), cudaMemcpyDeviceToHost,
                              stream_.get()),
              "cannot read a tensor");
  stream_.synchronize("what came before the call");
  return {copy, copy->data()};
}

void CudaBackend::getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                                    const LayoutOutputs& outputs) {
  requireUsable();
  const CurrentDevice current(device_);
  CountArguments arguments;
  arguments.topk = {topkIdx.data, nullptr, topkIdx.shape[1], topkIdx.dtype == DataType::int64};
  arguments.owner = placement_.get(placement, pool_, stream_.get()).owner;
  arguments.numTokens = topkIdx.shape[0];
  arguments.numExperts = placement.numExperts();
  arguments.numRanks = context_.size();
  arguments.perRank = static_cast<std::int32_t*>(outputs.numTokensPerRank.data);
  arguments.perExpert = static_cast<std::int32_t*>(outputs.numTokensPerExpert.data);
  arguments.inRank = static_cast<std::uint8_t*>(outputs.isTokenInRank.data);
  countTokens(arguments, stream_.get());
  stream_.synchronize("the layout");
}

/// What this version cannot do on a GPU.
void requireSupported(const BufferOptions& options) {
  if (options.enableShrink) {
    throw NotBuilt("enable_shrink on a GPU is not in this version of mscclpp_ep");
  }
  if (options.integrityCheck) {
    throw NotBuilt("integrity_check on a GPU is not in this version of mscclpp_ep");
  }
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
    connecting.segments = cudaSegments(options.device.index);
    if (options.maxArenaBytes == 0) {
      options.maxArenaBytes = connecting.segments->available() / 2 / bootstrap.size();
    }
    options.ranksPerDomain = bootstrap.size();
    trace = openTrace(options, bootstrap, bufferId);
  } catch (const Error& error) {
    declineToConnect(bootstrap, error.what());
    throw;
  }
  auto transport = std::make_unique<SharedMemory>(bootstrap, std::move(connecting));
  const CurrentDevice current(options.device.index);
  return std::make_shared<cuda::CudaBackend>(std::move(transport), std::move(trace), options,
                                             bufferId);
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
