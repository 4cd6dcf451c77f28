// SPDX-License-Identifier: MIT
#include "transport/segment.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>

#include "core/check.hpp"
#include "transport/memory_limit.hpp"

namespace mscclpp_ep {

namespace {

constexpr std::size_t kTouchStride = 4096;

/// Makes every page present and writable, without changing its bytes.
void touch(std::byte* data, std::size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  if (::madvise(data, bytes, MADV_POPULATE_WRITE) == 0) return;
  if (errno != EINVAL) EP_SYS_TRY(-1, "cannot take ", bytes, " bytes of shared memory");
#endif
  // Kernels before 5.14. Peers may use the bytes by now, so they are kept by an atomic addition.
  for (std::size_t i = 0; i < bytes; i += kTouchStride) {
    std::atomic_ref<unsigned char>(reinterpret_cast<unsigned char&>(data[i])).fetch_add(0);
  }
}

std::byte* mapShared(int fd, std::size_t bytes) {
  void* data = EP_SYS_TRY(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0),
                          "cannot map ", bytes, " bytes of shared memory");
  return static_cast<std::byte*>(data);
}

void unmapHost(std::byte* data, std::size_t bytes) { ::munmap(data, bytes); }

class HostSegments final : public SegmentSource {
 public:
  std::int64_t available() const override { return availableMemory(); }
  std::shared_ptr<Segment> create(std::size_t bytes) const override {
    return Segment::create(bytes);
  }
  std::uint64_t bytesBehind(int fd) const override { return fileBytes(fd); }
  std::shared_ptr<Segment> map(FileDescriptor fd, std::size_t bytes) const override {
    return Segment::map(std::move(fd), bytes);
  }
};

struct Registry {
  std::mutex mutex;
  std::map<SegmentRegistry::Name, std::weak_ptr<Segment>> segments;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

std::uint64_t fileBytes(int fd) {
  struct stat facts{};
  EP_SYS_TRY(::fstat(fd, &facts), "cannot tell the size of shared memory");
  return static_cast<std::uint64_t>(facts.st_size);
}

Segment::Segment(FileDescriptor fd, std::byte* data, std::size_t bytes, Unmap unmap)
    : fd_(std::move(fd)), data_(data), bytes_(bytes), unmap_(std::move(unmap)) {}

Segment::~Segment() { unmap_(data_, bytes_); }

std::shared_ptr<Segment> Segment::create(std::size_t bytes) {
  requireMemory(static_cast<std::int64_t>(bytes), "shared memory");
  FileDescriptor fd(EP_SYS_TRY(::memfd_create("mscclpp_ep", MFD_CLOEXEC),
                               "cannot create shared memory (memfd_create)"));
  EP_SYS_TRY(::ftruncate(fd.get(), static_cast<off_t>(bytes)), "cannot size shared memory to ",
             bytes, " bytes");
  std::byte* data = mapShared(fd.get(), bytes);
  auto segment = std::make_shared<Segment>(std::move(fd), data, bytes, unmapHost);
  touch(data, bytes);
  return segment;
}

std::shared_ptr<Segment> Segment::map(FileDescriptor fd, std::size_t bytes) {
  std::byte* data = mapShared(fd.get(), bytes);
  auto segment = std::make_shared<Segment>(std::move(fd), data, bytes, unmapHost);
  segment->closeFd();
  touch(data, bytes);
  return segment;
}

std::shared_ptr<const SegmentSource> hostSegments() {
  static const auto instance = std::make_shared<const HostSegments>();
  return instance;
}

std::uint64_t SegmentRegistry::newRank() {
  static std::atomic<std::uint64_t> next{1};
  return next.fetch_add(1);
}

void SegmentRegistry::add(const Name& name, const std::shared_ptr<Segment>& segment) {
  const std::lock_guard lock(registry().mutex);
  registry().segments[name] = segment;
}

std::shared_ptr<Segment> SegmentRegistry::find(const Name& name) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().segments.find(name);
  return found == registry().segments.end() ? nullptr : found->second.lock();
}

void SegmentRegistry::remove(const Name& name) {
  const std::lock_guard lock(registry().mutex);
  registry().segments.erase(name);
}

void SegmentRegistry::removeRank(std::uint64_t rank) {
  const std::lock_guard lock(registry().mutex);
  std::erase_if(registry().segments,
                [rank](const auto& entry) { return entry.first.rank == rank; });
}

}  // namespace mscclpp_ep
