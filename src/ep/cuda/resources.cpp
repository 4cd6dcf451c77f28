// SPDX-License-Identifier: MIT
#include "cuda/resources.hpp"

#include <algorithm>
#include <iterator>
#include <list>
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
  /// Blocks that were dropped, and are not free yet.
  struct Batch {
    std::unique_ptr<Fence> fence;
    std::vector<Block> blocks;
  };

  ~Shelves() {
    for (const auto& [size, data] : free) freeDeviceMemory(device, data);
    for (const Block& block : dropped) freeDeviceMemory(device, block.data);
    for (const Batch& batch : batches) {
      for (const Block& block : batch.blocks) freeDeviceMemory(device, block.data);
    }
  }

  std::byte* take(std::size_t size) {
    const auto found = free.find(size);
    if (found == free.end()) return nullptr;
    std::byte* data = found->second;
    free.erase(found);
    return data;
  }

  /// Frees what nobody uses any more.
  void collect(const MakeFence& makeFence) {
    if (!dropped.empty()) {
      if (auto fence = makeFence())
        batches.push_back({std::move(fence), std::exchange(dropped, {})});
    }
    for (auto batch = batches.begin(); batch != batches.end();) {
      const bool passed = batch->fence->passed();
      if (passed) {
        for (const Block& block : batch->blocks) free.emplace(block.size, block.data);
      }
      batch = passed ? batches.erase(batch) : std::next(batch);
    }
  }

  const int device = currentDevice();
  mutable std::mutex mutex;
  std::multimap<std::size_t, std::byte*> free;
  std::vector<Block> dropped;
  std::list<Batch> batches;
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
  return {data, [shelves = shelves_, size](std::byte* block) {
            const std::lock_guard held(shelves->mutex);
            shelves->dropped.push_back({size, block});
          }};
}

std::int64_t DevicePool::bytes() const {
  const std::lock_guard lock(shelves_->mutex);
  return shelves_->bytes;
}

}  // namespace mscclpp_ep::cuda
