// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/sizes.hpp"

namespace mscclpp_ep {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

std::vector<std::int64_t> localExperts(std::int64_t numExperts, int numRanks) {
  std::vector<std::int64_t> counts;
  counts.reserve(static_cast<std::size_t>(numRanks));
  for (int rank = 0; rank < numRanks; ++rank) {
    counts.push_back(numLocalExperts(numExperts, numRanks, rank));
  }
  return counts;
}

TEST_CASE("experts come in blocks, the last ones short or empty") {
  CHECK(localExperts(8, 4) == std::vector<std::int64_t>{2, 2, 2, 2});
  CHECK(localExperts(7, 4) == std::vector<std::int64_t>{2, 2, 2, 1});
  CHECK(localExperts(5, 4) == std::vector<std::int64_t>{2, 2, 1, 0});
  CHECK(localExperts(9, 8) == std::vector<std::int64_t>{2, 2, 2, 2, 1, 0, 0, 0});
  CHECK(localExperts(1, 3) == std::vector<std::int64_t>{1, 0, 0});
  CHECK(localExperts(6, 1) == std::vector<std::int64_t>{6});
}

TEST_CASE("every expert is somebody's, and nobody's block is too long") {
  for (std::int64_t numExperts = 1; numExperts <= 40; ++numExperts) {
    for (int numRanks = 1; numRanks <= 20; ++numRanks) {
      std::vector<std::int64_t> byOwner(static_cast<std::size_t>(numRanks));
      const std::int64_t block = (numExperts + numRanks - 1) / numRanks;
      for (std::int64_t e = 0; e < numExperts; ++e) ++byOwner[static_cast<std::size_t>(e / block)];
      REQUIRE(localExperts(numExperts, numRanks) == byOwner);
    }
  }
}

TEST_CASE("numLocalExperts refuses what is no expert, group or rank") {
  CHECK_THROWS_WITH_AS(numLocalExperts(0, 2, 0),
                       "the number of experts is 0; it must be at least 1", InvalidArgument);
  CHECK_THROWS_WITH_AS(numLocalExperts(4, 0, 0), "the number of ranks is 0; it must be at least 1",
                       InvalidArgument);
  CHECK_THROWS_WITH_AS(numLocalExperts(4, 2, 2), "the rank is 2; it must be in [0, 2)",
                       InvalidArgument);
  CHECK_THROWS_AS(numLocalExperts(4, 2, -1), InvalidArgument);
  CHECK(numLocalExperts(kHuge, 2, 1) == kHuge / 2);
}

TEST_CASE("recvCapacity is one row per token of any rank") {
  CHECK(recvCapacity(4096, 8) == 32768);
  CHECK(recvCapacity(0, 8) == 0);
  CHECK_THROWS_AS(recvCapacity(-1, 8), InvalidArgument);
  CHECK_THROWS_AS(recvCapacity(1, 0), InvalidArgument);
  CHECK_THROWS_AS(recvCapacity(kHuge, 2), InvalidArgument);
}

TEST_CASE("checked rounds the RDMA receive chunk up to a multiple of the send chunk") {
  CHECK(checked({}).numMaxRdmaChunkedRecvTokens == 258);
  CHECK(checked({20, 36, 288, 20, 128}).numMaxRdmaChunkedRecvTokens == 140);
  CHECK(checked({20, 32, 288, 8, 128}).numMaxRdmaChunkedRecvTokens == 128);
  // Fits only when rounded up.
  CHECK(checked({20, 32, 288, 8, 9}).numMaxRdmaChunkedRecvTokens == 16);
}

TEST_CASE("checked refuses chunks that do not fit together") {
  CHECK_NOTHROW(checked({0, 1, 2, 1, 2}));
  CHECK_THROWS_AS(checked({-1, 1, 2, 1, 2}), InvalidArgument);
  CHECK_THROWS_AS(checked({0, 0, 2, 1, 2}), InvalidArgument);
  CHECK_THROWS_AS(checked({0, 1, 2, 0, 2}), InvalidArgument);
  CHECK_THROWS_AS(checked({0, 1, 2, 1, -2}), InvalidArgument);
  CHECK_THROWS_AS(checked({0, 1, 2, 1, 1}), InvalidArgument);
  CHECK_THROWS_AS(checked({0, 1, 2, 3, 2}), InvalidArgument);
  CHECK_THROWS_WITH_AS(checked({0, 256, 256, 1, 2}),
                       "a config has NVLink chunks of 256 sent and 256 received tokens; fewer must "
                       "be sent than received",
                       InvalidArgument);
}

TEST_CASE("the hints of Config are DeepEP's") {
  CHECK(nvlBufferSizeHint({}, 14336, 2) == 83'927'552);
  CHECK(nvlBufferSizeHint({}, 14336, 8) == 335'709'824);
  // Its tuned numbers for 16 and for 64 ranks.
  const Config of16{20, 36, 288, 20, 128};
  const Config of64{20, 32, 288, 8, 128};
  CHECK(nvlBufferSizeHint(of16, 14336, 16) == 377'673'984);
  CHECK(nvlBufferSizeHint(of64, 14336, 64) == 377'677'824);
  CHECK(rdmaBufferSizeHint({}, 14336, 8) == 0);
  CHECK(rdmaBufferSizeHint(of16, 14336, 16) == 91'887'744);
  CHECK(rdmaBufferSizeHint(of64, 14336, 64) == 336'047'360);
}

TEST_CASE("the hints of Config serve any number of ranks") {
  CHECK(nvlBufferSizeHint({}, 14336, 12) == nvlBufferSizeHint({}, 14336, 16));
  CHECK(rdmaBufferSizeHint({}, 14336, 9) == rdmaBufferSizeHint({}, 14336, 16));
  CHECK(nvlBufferSizeHint({0, 6, 256, 6, 256}, 14336, 8) == 0);
}

TEST_CASE("the hints of Config refuse what is no size") {
  CHECK_THROWS_AS(nvlBufferSizeHint({}, -1, 8), InvalidArgument);
  CHECK_THROWS_AS(nvlBufferSizeHint({}, 14336, 0), InvalidArgument);
  CHECK_THROWS_AS(nvlBufferSizeHint({}, kHuge, 8), InvalidArgument);
  CHECK_THROWS_AS(nvlBufferSizeHint({20, 6, 6, 6, 256}, 14336, 8), InvalidArgument);
  CHECK_THROWS_AS(rdmaBufferSizeHint({}, -1, 16), InvalidArgument);
  CHECK_THROWS_AS(rdmaBufferSizeHint({}, 14336, -8), InvalidArgument);
  CHECK_THROWS_AS(rdmaBufferSizeHint({}, kHuge / 4, 16), InvalidArgument);
}

TEST_CASE("the low-latency hint is DeepEP's") {
  CHECK(lowLatencyRdmaSizeHint(128, 3072, 2, 288) == 920'127'872);
  CHECK(lowLatencyRdmaSizeHint(128, 7168, 8, 288) == 2'146'961'792);
  CHECK(lowLatencyRdmaSizeHint(128, 7168, 8, 256) == 1'908'410'496);
  CHECK(lowLatencyRdmaSizeHint(256, 7168, 16, 256) == 3'816'818'816);
}

TEST_CASE("the low-latency hint refuses what is no size") {
  CHECK_NOTHROW(lowLatencyRdmaSizeHint(1, 1, 1, 1));
  CHECK_THROWS_AS(lowLatencyRdmaSizeHint(0, 7168, 8, 256), InvalidArgument);
  CHECK_THROWS_AS(lowLatencyRdmaSizeHint(128, 0, 8, 256), InvalidArgument);
  CHECK_THROWS_AS(lowLatencyRdmaSizeHint(128, 7168, 0, 256), InvalidArgument);
  CHECK_THROWS_AS(lowLatencyRdmaSizeHint(128, 7168, 8, 0), InvalidArgument);
  CHECK_THROWS_AS(lowLatencyRdmaSizeHint(kHuge, 7168, 8, 256), InvalidArgument);
}

}  // namespace
}  // namespace mscclpp_ep
