// SPDX-License-Identifier: MIT
// Memory that ranks share: an anonymous file (memfd) that has no name in any file system, so that
// nothing is left behind however a rank ends.
#ifndef MSCCLPP_EP_TRANSPORT_SEGMENT_HPP_
#define MSCCLPP_EP_TRANSPORT_SEGMENT_HPP_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "transport/file_descriptor.hpp"

namespace mscclpp_ep {

/// The bytes of the file behind shared memory.
std::uint64_t fileBytes(int fd);

/// Memory that is mapped here, until this dies.
class Segment {
 public:
  /// New zeroed memory, every page of it touched. Throws SystemError, before it takes any, if there
  /// is not enough.
  static std::shared_ptr<Segment> create(std::size_t bytes);
  /// Maps what another process created, and touches it: a cold page costs many times a warm one.
  static std::shared_ptr<Segment> map(FileDescriptor fd, std::size_t bytes);

  /// `unmap` is called with the memory in the end.
  using Unmap = std::function<void(std::byte* data, std::size_t bytes)>;
  Segment(FileDescriptor fd, std::byte* data, std::size_t bytes, Unmap unmap);
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }
  void closeFd() { fd_ = FileDescriptor(); }

 private:
  FileDescriptor fd_;
  std::byte* data_;
  std::size_t bytes_;
  Unmap unmap_;
};

/// A kind of memory, in which ranks share their rows.
class SegmentSource {
 public:
  SegmentSource() = default;
  SegmentSource(const SegmentSource&) = delete;
  SegmentSource& operator=(const SegmentSource&) = delete;
  virtual ~SegmentSource() = default;

  /// Bytes that create() can take now.
  virtual std::int64_t available() const = 0;
  /// New memory of at least so many bytes. Throws SystemError if there is not enough.
  virtual std::shared_ptr<Segment> create(std::size_t bytes) const = 0;
  /// Bytes behind a descriptor that came from a peer; the largest number if that cannot be told.
  virtual std::uint64_t bytesBehind(int fd) const = 0;
  /// Maps what another process created.
  virtual std::shared_ptr<Segment> map(FileDescriptor fd, std::size_t bytes) const = 0;
};

/// The memory of the host.
std::shared_ptr<const SegmentSource> hostSegments();

/// Segments by name, for ranks that are threads of one process: they share one mapping, as two
/// mappings of the same bytes look like unrelated memory to the tools that look for races.
class SegmentRegistry {
 public:
  struct Name {
    std::uint64_t rank = 0;  ///< from newRank(): tells apart the ranks of this process
    std::uint32_t segment = 0;

    friend auto operator<=>(const Name&, const Name&) = default;
  };

  static std::uint64_t newRank();
  static void add(const Name& name, const std::shared_ptr<Segment>& segment);
  /// Null if the rank has gone.
  static std::shared_ptr<Segment> find(const Name& name);
  static void remove(const Name& name);
  static void removeRank(std::uint64_t rank);
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_SEGMENT_HPP_
