// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory_map.hpp"
#include "mscclpp_ep/error.hpp"
#include "support/ranks.hpp"
#include "transport/segment.hpp"

namespace mscclpp_ep {
namespace {

bool isZero(const Segment& segment) {
  return std::all_of(segment.data(), segment.data() + segment.bytes(),
                     [](std::byte byte) { return byte == std::byte{0}; });
}

TEST_CASE("a new segment is zeroed, and its descriptor closes on exec") {
  const auto segment = Segment::create(5 * kPage);
  CHECK(segment->bytes() == 5 * kPage);
  CHECK(isZero(*segment));
  CHECK((::fcntl(segment->fd(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("another mapping has the same bytes, which it keeps") {
  const auto segment = Segment::create(3 * kPage);
  std::fill_n(segment->data(), segment->bytes(), std::byte{0x5A});
  const auto other = Segment::map(FileDescriptor(::dup(segment->fd())), segment->bytes());
  CHECK(other->data() != segment->data());
  CHECK(other->fd() < 0);
  CHECK(std::equal(segment->data(), segment->data() + segment->bytes(), other->data()));
  other->data()[kPage] = std::byte{7};
  CHECK(segment->data()[kPage] == std::byte{7});
}

TEST_CASE("a mapping outlives the segment that it was made from") {
  auto segment = Segment::create(kPage);
  segment->data()[3] = std::byte{9};
  const auto other = Segment::map(FileDescriptor(::dup(segment->fd())), kPage);
  segment.reset();
  CHECK(other->data()[3] == std::byte{9});
}

TEST_CASE("the descriptor may be closed before the memory is used") {
  const auto segment = Segment::create(kPage);
  const int fd = segment->fd();
  segment->closeFd();
  CHECK(segment->fd() < 0);
  CHECK(::fcntl(fd, F_GETFD) == -1);
  segment->data()[0] = std::byte{1};
}

TEST_CASE("more memory than there is, is refused before any is taken") {
  CHECK_THROWS_AS(Segment::create(std::size_t{1} << 60), SystemError);
}

TEST_CASE("what is no memory cannot be mapped") {
  CHECK_THROWS_AS(Segment::map(FileDescriptor(), kPage), SystemError);
}

TEST_CASE("the registry finds segments by name while they live") {
  const std::uint64_t rank = SegmentRegistry::newRank();
  CHECK(SegmentRegistry::newRank() != rank);
  auto first = Segment::create(kPage);
  const auto second = Segment::create(kPage);
  SegmentRegistry::add({rank, 1}, first);
  SegmentRegistry::add({rank, 2}, second);
  CHECK(SegmentRegistry::find({rank, 1}) == first);
  CHECK(SegmentRegistry::find({rank, 2}) == second);
  CHECK(SegmentRegistry::find({rank, 3}) == nullptr);
  CHECK(SegmentRegistry::find({rank + 1000, 1}) == nullptr);
  first.reset();
  CHECK(SegmentRegistry::find({rank, 1}) == nullptr);
  SegmentRegistry::remove({rank, 2});
  CHECK(SegmentRegistry::find({rank, 2}) == nullptr);
}

TEST_CASE("a rank's end takes its names away, and only those") {
  const std::uint64_t gone = SegmentRegistry::newRank();
  const std::uint64_t other = SegmentRegistry::newRank();
  const auto segment = Segment::create(kPage);
  for (const std::uint32_t id : {0u, 1u, 9u}) SegmentRegistry::add({gone, id}, segment);
  SegmentRegistry::add({other, 1}, segment);
  SegmentRegistry::removeRank(gone);
  for (const std::uint32_t id : {0u, 1u, 9u}) CHECK(SegmentRegistry::find({gone, id}) == nullptr);
  CHECK(SegmentRegistry::find({other, 1}) == segment);
  SegmentRegistry::removeRank(other);
}

TEST_CASE("threads may use the registry at once") {
  CHECK_NOTHROW(testing::runThreads(4, [](int) {
    for (int i = 0; i < 300; ++i) {
      const std::uint64_t rank = SegmentRegistry::newRank();
      const auto segment =
          std::make_shared<Segment>(FileDescriptor(), nullptr, 0, [](std::byte*, std::size_t) {});
      SegmentRegistry::add({rank, 0}, segment);
      testing::require(SegmentRegistry::find({rank, 0}) == segment, "a segment is found");
      SegmentRegistry::removeRank(rank);
    }
  }));
}

}  // namespace
}  // namespace mscclpp_ep
