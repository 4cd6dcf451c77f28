// SPDX-License-Identifier: MIT
#include "cuda/diagnostics.hpp"

#include "cuda/kernels.hpp"
#include "host/exchange_counts.hpp"
#include "host/rounds.hpp"
#include "mscclpp_ep/diagnostics.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep {
namespace cuda {

namespace {

/// As long as those of a large model.
constexpr std::int64_t kRowBytes = 16384;

/// A time between two points in a stream.
class Stopwatch {
 public:
  Stopwatch() {
    EP_CUDA_TRY(cudaEventCreate(&begin_), "cannot make an event");
    EP_CUDA_TRY(cudaEventCreate(&end_), "cannot make an event");
  }
  ~Stopwatch() {
    (void)cudaEventDestroy(begin_);
    (void)cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  void start(cudaStream_t stream) { record(begin_, stream); }
  double stop(cudaStream_t stream) {
    record(end_, stream);
    EP_CUDA_TRY(cudaEventSynchronize(end_), "a push failed on the GPU");
    float milliseconds = 0;
    EP_CUDA_TRY(cudaEventElapsedTime(&milliseconds, begin_, end_), "cannot read a time");
    return milliseconds * 1e-3;
  }

 private:
  static void record(cudaEvent_t event, cudaStream_t stream) {
    EP_CUDA_TRY(cudaEventRecord(event, stream), "cannot record an event");
  }

  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

/// Where the rank after this one takes rows.
std::byte* nextLanding(Context& context, std::size_t bytes) {
  DispatchPublish publication;
  try {
    publication.columns[kRows] = context.arena.landing(bytes).address;
  } catch (const Error& error) {
    publication.status = refusal(Verdict::noRoom, error.what());
  }
  const std::vector<Message> outgoing(static_cast<std::size_t>(context.size()),
                                      encode(publication));
  const auto& published = exchangePublications(context, outgoing, "push");
  const int next = (context.rank() + 1) % context.size();
  if (context.masked(next)) return nullptr;
  const ArrayAddress address =
      decodePublish(published[static_cast<std::size_t>(next)], static_cast<std::size_t>(next))
          .columns[kRows];
  const RowRange rows{0, static_cast<std::int64_t>(bytes) / kRowBytes};
  return next == context.rank() ? context.arena.landing(bytes).data.get()
                                : peerRows(context, next, address, rows, kRowBytes, 1);
}

/// What all pushes of one timing work with, in the memory of the GPU.
struct PushMemory {
  PushMemory(Context& context, std::int64_t rows, std::size_t next)
      : source(context.pool.allocate(static_cast<std::size_t>(rows) * kRowBytes)),
        head(static_cast<std::size_t>(rows * context.size())) {
    const auto ranks = static_cast<std::size_t>(context.size());
    std::vector<std::int32_t> heads(static_cast<std::size_t>(rows) * ranks, -1);
    for (std::size_t row = 0; row < static_cast<std::size_t>(rows); ++row) {
      heads[row * ranks + next] = static_cast<std::int32_t>(row);
    }
    head.write(heads);
    context.reserveTables(1);
  }

  std::shared_ptr<std::byte> source;
  DeviceArray<std::int32_t> head;
};

std::unique_ptr<PushMemory> takePushMemory(Context& context, std::int64_t rows, std::size_t next) {
  try {
    return std::make_unique<PushMemory>(context, rows, next);
  } catch (const Error& error) {
    abandonRows(context, Verdict::noRoom, error.what());
    throw OperationRefused{std::current_exception()};
  }
}

}  // namespace

std::vector<double> timePush(Context& context, std::size_t bytes, int repeats) {
  const auto rows = static_cast<std::int64_t>(alignUp(bytes, kRowBytes)) / kRowBytes;
  const auto ranks = static_cast<std::size_t>(context.size());
  const auto next = static_cast<std::size_t>((context.rank() + 1) % context.size());
  const auto memory = takePushMemory(context, rows, next);
  PushArguments push;
  push.rows = memory->source.get();
  push.rowBytes = kRowBytes;
  push.head = memory->head.get();
  // Without `sent`: at will, as what is asked for is how much the link takes.
  push.numTokens = rows;
  push.numRanks = context.size();
  push.rowAlignment = Alignment::kMost;
  push.order = context.order;
  std::vector<PushTarget> targets(ranks);
  targets[next].columns[kRows] = nextLanding(context, static_cast<std::size_t>(rows) * kRowBytes);
  targets[next].span = {0, rows};
  if (context.mayLose()) context.losses->tell(context.stream, context.capturing);
  push.targets = context.perRank(targets);
  Stopwatch watch;
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    // The first brings the ranks together.
    pushRows(push, context.numSms, context.stream);
    watch.start(context.stream);
    pushRows(push, context.numSms, context.stream);
    seconds.push_back(watch.stop(context.stream));
  }
  return seconds;
}

}  // namespace cuda

std::vector<GpuInfo> gpus() {
  std::vector<GpuInfo> result;
  const int count = cudaDeviceCount();
  for (int gpu = 0; gpu < count; ++gpu) {
    const CurrentDevice current(gpu);
    cudaDeviceProp properties{};
    EP_CUDA_TRY(cudaGetDeviceProperties(&properties, gpu), "cannot tell what GPU ", gpu, " is");
    GpuInfo info;
    info.name = properties.name;
    info.multiprocessors = properties.multiProcessorCount;
    info.capabilityMajor = properties.major;
    info.capabilityMinor = properties.minor;
    EP_CUDA_TRY(cudaMemGetInfo(&info.freeBytes, &info.totalBytes), "cannot tell the memory of GPU ",
                gpu);
    info.posixHandles = sharesByDescriptor(gpu);
    for (int peer = 0; peer < count; ++peer) {
      int reaches = peer == gpu ? 1 : 0;
      if (peer != gpu) {
        EP_CUDA_TRY(cudaDeviceCanAccessPeer(&reaches, gpu, peer), "cannot tell whether GPU ", gpu,
                    " reaches GPU ", peer);
      }
      info.reaches.push_back(reaches != 0);
    }
    result.push_back(std::move(info));
  }
  return result;
}

CudaVersions cudaVersions() {
  CudaVersions versions;
  EP_CUDA_TRY(cudaRuntimeGetVersion(&versions.runtime), "cannot tell the version of CUDA");
  if (cudaDriverGetVersion(&versions.driver) != cudaSuccess) versions.driver = 0;
  return versions;
}

}  // namespace mscclpp_ep
