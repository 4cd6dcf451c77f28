// SPDX-License-Identifier: MIT
#include "cuda/resources.hpp"

#include <algorithm>
#include <map>
#include <mutex>

#include "core/memory_map.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep::cuda {

namespace {

/// Streams that nobody owns, by device.
struct IdleStreams {
  std::mutex mutex;
  std::map<int, std::vector<cudaStream_t>> streams;
};

IdleStreams& idleStreams() {
  static auto& instance = *new IdleStreams;
  return instance;
}

cudaStream_t makeStream() {
  int least = 0;
  int greatest = 0;
  EP_CUDA_TRY(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cannot make a stream");
  cudaStream_t stream = nullptr;
  EP_CUDA_TRY(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
              "cannot make a stream");
  return stream;
}

}  // namespace

OwnedStream::OwnedStream() : device_(currentDevice()) {
  IdleStreams& idle = idleStreams();
  {
    const std::lock_guard lock(idle.mutex);
    std::vector<cudaStream_t>& streams = idle.streams[device_];
    if (!streams.empty()) {
      stream_ = streams.back();
      streams.pop_back();
      return;
    }
  }
  stream_ = makeStream();
}

OwnedStream::~OwnedStream() {
  const std::lock_guard lock(idleStreams().mutex);
  idleStreams().streams[device_].push_back(stream_);
}

void* takeDeviceMemory(std::size_t bytes) {
  const RelaxedCapture relaxed;
  void* data = nullptr;
  const cudaError_t taken = cudaMalloc(&data, std::max<std::size_t>(bytes, 1));
  if (taken == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw SystemError(
        cat("the operation needs ", bytes, " bytes of GPU memory, and there are not so many"));
  }
  EP_CUDA_TRY(taken, "cannot take ", bytes, " bytes of GPU memory");
  return data;
}

void freeDeviceMemory(int device, void* data) {
  releaseWhenIdle(device, [data] { (void)cudaFree(data); });
}

/// Blocks by size.
struct DevicePool::Shelves {
  struct Block {
    std::size_t size;
    std::byte* data;
  };

  ~Shelves() {
    for (const auto& [size, data] : free) freeDeviceMemory(device, data);
    for (const Block& block : returned.takeAll()) freeDeviceMemory(device, block.data);
  }

  std::byte* take(std::size_t size) {
    const auto found = free.find(size);
    if (found == free.end()) return nullptr;
    std::byte* data = found->second;
    free.erase(found);
    return data;
  }

  void collect(const MakeFence& makeFence) {
    for (const Block& block : returned.collect(makeFence)) free.emplace(block.size, block.data);
  }

  const int device = currentDevice();
  ReturnedBlocks<Block> returned;
  mutable std::mutex mutex;  ///< of what follows
  std::multimap<std::size_t, std::byte*> free;
  std::int64_t bytes = 0;
};

DevicePool::DevicePool(MakeFence makeFence)
    : shelves_(std::make_shared<Shelves>()), makeFence_(std::move(makeFence)) {}

std::shared_ptr<std::byte> DevicePool::allocate(std::size_t bytes) {
  const std::size_t size = blockBytes(std::max<std::size_t>(bytes, 1));
  const std::lock_guard lock(shelves_->mutex);
  std::byte* data = shelves_->take(size);
  if (data == nullptr) {
    shelves_->collect(makeFence_);
    data = shelves_->take(size);
  }
  if (data == nullptr) {
    data = static_cast<std::byte*>(takeDeviceMemory(size));
    shelves_->bytes += static_cast<std::int64_t>(size);
  }
  return {data,
          [shelves = shelves_, size](std::byte* block) { shelves->returned.add({size, block}); }};
}

void DevicePool::freeDropped() { shelves_->returned.freeDropped(); }

std::int64_t DevicePool::bytes() const {
  const std::lock_guard lock(shelves_->mutex);
  return shelves_->bytes;
}

}  // namespace mscclpp_ep::cuda
