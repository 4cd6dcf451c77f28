// SPDX-License-Identifier: MIT
#include "transport/cuda_memory.hpp"

#include <cuda.h>

#include <bit>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "core/memory_map.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep {

namespace {

// Entry points are those of CUDA 12.0's driver, by which all that is used here was there.
constexpr unsigned kDriverVersion = 12000;

template <typename Function>
Function entryPoint(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  EP_CUDA_TRY(
      cudaGetDriverEntryPointByVersion(name, &function, kDriverVersion, cudaEnableDefault, &found),
      "cannot look for ", name, " in the CUDA driver");
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw NotBuilt(cat("the CUDA driver has no ", name, "; driver 525 or newer is needed"));
  }
  return reinterpret_cast<Function>(function);
}

#define EP_ENTRY_POINT(name) decltype(&::name) name = entryPoint<decltype(&::name)>(#name)
/// The functions of the driver. They are looked up at run time, so that the library loads where
/// there is none.
struct Driver {
  EP_ENTRY_POINT(cuGetErrorString);
  EP_ENTRY_POINT(cuDeviceGetAttribute);
  EP_ENTRY_POINT(cuMemGetAllocationGranularity);
  EP_ENTRY_POINT(cuMemCreate);
  EP_ENTRY_POINT(cuMemRelease);
  EP_ENTRY_POINT(cuMemAddressReserve);
  EP_ENTRY_POINT(cuMemAddressFree);
  EP_ENTRY_POINT(cuMemMap);
  EP_ENTRY_POINT(cuMemUnmap);
  EP_ENTRY_POINT(cuMemSetAccess);
  EP_ENTRY_POINT(cuMemExportToShareableHandle);
  EP_ENTRY_POINT(cuMemImportFromShareableHandle);
};
#undef EP_ENTRY_POINT

const Driver& driver() {
  static const Driver instance;
  return instance;
}

template <typename... Parts>
void check(CUresult result, const Parts&... what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().cuGetErrorString(result, &text);
  const std::string message = cat(what..., ": ", text != nullptr ? text : "an unknown error",
                                  " (CUDA driver error ", static_cast<int>(result), ")");
  // A size that does not fit is no failure of the GPU: the caller may do with less.
  if (result == CUDA_ERROR_OUT_OF_MEMORY) throw SystemError(message);
  throw CudaError(message);
}

CUmemLocation locationOf(int device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device;
  return location;
}

CUmemAllocationProp properties(int device) {
  CUmemAllocationProp result{};
  result.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  result.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  result.location = locationOf(device);
  int rdma = 0;
  EP_CUDA_TRY(cudaDeviceGetAttribute(&rdma, cudaDevAttrGPUDirectRDMASupported, device),
              "cannot tell what GPU ", device, " can do");
  result.allocFlags.gpuDirectRDMACapable = rdma != 0 ? 1 : 0;
  return result;
}

/// A physical allocation; its mappings keep it.
class Allocation {
 public:
  explicit Allocation(CUmemGenericAllocationHandle handle) : handle_(handle) {}
  ~Allocation() { driver().cuMemRelease(handle_); }
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_;
};

/// Waits for all work of the current GPU; false if that fails. cudaFree() does, as what it frees
/// may be in use; cudaDeviceSynchronize() would spoil a graph that any thread captures meanwhile.
bool awaitGpu() {
  void* nothing = nullptr;
  return cudaMalloc(&nothing, 1) == cudaSuccess && cudaFree(nothing) == cudaSuccess;
}

/// The ranks of this process that share the memory of a GPU, and how memory there is given back
/// that nobody wants any more.
class Residents {
 public:
  static Residents& of(int device) {
    static std::mutex mutex;
    // Never destroyed: tensors may be dropped at the very end of the process.
    static auto& all = *new std::map<int, Residents>;
    const std::lock_guard lock(mutex);
    return all[device];
  }

  void join(int rank) {
    const std::lock_guard lock(mutex_);
    ranks_.insert(rank);
  }
  void leave(int device, int rank) {
    {
      const std::lock_guard lock(mutex_);
      ranks_.erase(ranks_.find(rank));
    }
    giveBack(device);
  }
  int count() {
    const std::lock_guard lock(mutex_);
    return static_cast<int>(ranks_.size());
  }

  void drop(int device, std::function<void()> release) {
    {
      const std::lock_guard lock(mutex_);
      dropped_.push_back(std::move(release));
    }
    giveBack(device);
  }

 private:
  /// What may be given back now. Ranks of different groups may have the same number: these do not
  /// wait for each other.
  std::vector<std::function<void()>> takeDropped() {
    const std::lock_guard lock(mutex_);
    const bool several = !ranks_.empty() && *ranks_.begin() != *ranks_.rbegin();
    return several ? std::vector<std::function<void()>>() : std::exchange(dropped_, {});
  }

  void giveBack(int device) {
    std::vector<std::function<void()>> dropped = takeDropped();
    if (dropped.empty()) return;
    const RelaxedCapture relaxed;
    int before = 0;
    (void)cudaGetDevice(&before);
    (void)cudaSetDevice(device);
    // If it fails, the GPU may still use the memory, which stays: work on the GPU has failed, or
    // the driver has gone at the end of the process.
    const bool idle = awaitGpu();
    if (idle) {
      for (const auto& release : dropped) release();
    }
    (void)cudaSetDevice(before);
    (void)cudaGetLastError();
    if (idle) return;
    const std::lock_guard lock(mutex_);
    dropped_.insert(dropped_.end(), dropped.begin(), dropped.end());
  }

  std::mutex mutex_;
  std::multiset<int> ranks_;  ///< one of each buffer
  std::vector<std::function<void()>> dropped_;
};

void unmap(std::byte* data, std::size_t bytes) {
  const auto address = reinterpret_cast<CUdeviceptr>(data);
  driver().cuMemUnmap(address, bytes);
  driver().cuMemAddressFree(address, bytes);
}

/// Addresses until they are given to a Segment.
struct Reservation {
  ~Reservation() {
    if (address == 0) return;
    if (mapped) driver().cuMemUnmap(address, bytes);
    driver().cuMemAddressFree(address, bytes);
  }
  std::byte* release() { return std::bit_cast<std::byte*>(std::exchange(address, 0)); }

  CUdeviceptr address = 0;
  std::size_t bytes = 0;
  bool mapped = false;
};

class CudaSegments final : public SegmentSource {
 public:
  CudaSegments(int device, int rank) : device_(device), rank_(rank) {
    if (!sharesByDescriptor(device)) {
      throw NotBuilt(
          cat("GPU ", device, " cannot share memory by file descriptors, which the library needs"));
    }
    const CUmemAllocationProp wanted = properties(device);
    check(driver().cuMemGetAllocationGranularity(&granularity_, &wanted,
                                                 CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
          "cannot tell the page size of GPU ", device);
    Residents::of(device).join(rank);
  }
  ~CudaSegments() override { Residents::of(device_).leave(device_, rank_); }

  std::int64_t available() const override {
    const CurrentDevice current(device_);
    std::size_t free = 0;
    std::size_t total = 0;
    EP_CUDA_TRY(cudaMemGetInfo(&free, &total), "cannot tell the free memory of GPU ", device_);
    return static_cast<std::int64_t>(free);
  }

  std::shared_ptr<Segment> create(std::size_t bytes) const override {
    const std::size_t whole = alignUp(bytes, granularity_);
    const CUmemAllocationProp wanted = properties(device_);
    CUmemGenericAllocationHandle handle = 0;
    check(driver().cuMemCreate(&handle, whole, &wanted, 0), "cannot take ", whole,
          " bytes of the memory of GPU ", device_);
    const Allocation allocation(handle);
    int fd = -1;
    check(driver().cuMemExportToShareableHandle(&fd, handle,
                                                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
          "cannot share memory of GPU ", device_);
    FileDescriptor shared(fd);
    return mapped(allocation, whole, std::move(shared), reachableFrom());
  }

  std::uint64_t bytesBehind(int) const override {
    return std::numeric_limits<std::uint64_t>::max();
  }

  std::shared_ptr<Segment> map(FileDescriptor fd, std::size_t bytes) const override {
    CUmemGenericAllocationHandle handle = 0;
    check(driver().cuMemImportFromShareableHandle(
              &handle, std::bit_cast<void*>(static_cast<std::uintptr_t>(fd.get())),
              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
          "cannot take in the memory of another rank on GPU ", device_);
    const Allocation allocation(handle);
    return mapped(allocation, bytes, FileDescriptor(), {device_});
  }

 private:
  /// The GPUs of this process that can use the memory of this one.
  std::vector<int> reachableFrom() const {
    int count = 0;
    EP_CUDA_TRY(cudaGetDeviceCount(&count), "cannot count the GPUs");
    std::vector<int> devices;
    for (int other = 0; other < count; ++other) {
      int reaches = other == device_ ? 1 : 0;
      if (other != device_) {
        EP_CUDA_TRY(cudaDeviceCanAccessPeer(&reaches, other, device_), "cannot tell whether GPU ",
                    other, " reaches GPU ", device_);
      }
      if (reaches != 0) devices.push_back(other);
    }
    return devices;
  }

  std::shared_ptr<Segment> mapped(const Allocation& allocation, std::size_t bytes,
                                  FileDescriptor fd, const std::vector<int>& devices) const {
    Reservation place;
    check(driver().cuMemAddressReserve(&place.address, bytes, granularity_, 0, 0), "cannot find ",
          bytes, " bytes of addresses");
    place.bytes = bytes;
    check(driver().cuMemMap(place.address, bytes, 0, allocation.get(), 0), "cannot map ", bytes,
          " bytes of GPU memory");
    place.mapped = true;
    std::vector<CUmemAccessDesc> access;
    access.reserve(devices.size());
    for (const int device : devices) {
      access.push_back({locationOf(device), CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
    }
    check(driver().cuMemSetAccess(place.address, bytes, access.data(), access.size()), "GPU ",
          device_, " cannot reach memory of another rank's GPU; see nvidia-smi topo -p2p rw");
    return std::make_shared<Segment>(std::move(fd), place.release(), bytes,
                                     [device = device_](std::byte* data, std::size_t size) {
                                       releaseWhenIdle(device, [=] { unmap(data, size); });
                                     });
  }

  const int device_;
  const int rank_;
  std::size_t granularity_ = 0;
};

}  // namespace

bool sharesByDescriptor(int device) {
  int shareable = 0;
  check(driver().cuDeviceGetAttribute(
            &shareable, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device),
        "cannot tell what GPU ", device, " can do");
  return shareable != 0;
}

void releaseWhenIdle(int device, std::function<void()> release) {
  Residents::of(device).drop(device, std::move(release));
}

int ranksOnDevice(int device) { return Residents::of(device).count(); }

std::shared_ptr<const SegmentSource> cudaSegments(int device, int rank) {
  const CurrentDevice current(device);
  // Makes the context, which the driver's functions need.
  EP_CUDA_TRY(cudaFree(nullptr), "cannot use GPU ", device);
  return std::make_shared<const CudaSegments>(device, rank);
}

}  // namespace mscclpp_ep
