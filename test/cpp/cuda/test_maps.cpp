// SPDX-License-Identifier: MIT
// Where things are in memory that kernels of several ranks use.
#include <doctest/doctest.h>

#include <set>

#include "cuda/combine_push.hpp"
#include "cuda/order.hpp"
#include "cuda/routing.hpp"

namespace mscclpp_ep::cuda {
namespace {

TEST_CASE("each word has a line of its own, within the bytes of all") {
  for (const int ranks : {1, 2, 3, 8, 64}) {
    const SignalMap map(ranks);
    std::set<std::size_t> lines;
    for (int word = 0; word < static_cast<int>(Word::numWords); ++word) {
      for (int writer = 0; writer < ranks; ++writer) {
        const std::size_t at = map.at(static_cast<Word>(word), writer) * sizeof(std::uint64_t);
        CHECK(at + sizeof(std::uint64_t) <= map.bytes());
        CHECK(lines.insert(at / 128).second);
      }
    }
  }
}

TEST_CASE("counts of a dispatch do not overlap") {
  for (const int ranks : {1, 2, 8}) {
    for (const std::int64_t experts : {0, 1, 128}) {
      const CountsMap map(ranks, experts);
      const std::int64_t starts[] = {map.sent(),          map.numRecv(),     map.prefixMatrix(),
                                     map.channelPrefix(), map.perExpert(),   map.firstRows(),
                                     map.firstRowFrom(),  map.numKeptFrom(), map.size()};
      const std::int64_t sizes[] = {ranks, 1, ranks * ranks, ranks, experts, ranks, ranks, ranks};
      for (int i = 0; i < 8; ++i) CHECK(starts[i] + sizes[i] == starts[i + 1]);
    }
  }
}

TEST_CASE("parts of a plan's report do not overlap") {
  for (const int ranks : {1, 2, 64}) {
    for (const std::int64_t experts : {0, 1, 256}) {
      const ReportMap map(ranks, experts);
      const std::int64_t starts[] = {map.perRank(),  map.perExpert(), map.countsDiffer(),
                                     map.badPlace(), map.badId(),     map.sent(),
                                     map.choices(),  map.size()};
      const std::int64_t sizes[] = {ranks, experts, 1, 2, 2, ranks, experts};
      CHECK(starts[0] == 0);
      CHECK(map.findings() == map.countsDiffer());
      for (int i = 0; i < 7; ++i) CHECK(starts[i] + sizes[i] == starts[i + 1]);
    }
  }
}

TEST_CASE("flags suffice for every row of every source") {
  for (const std::int64_t rowBytes : {1, 2, 14336, 1 << 20}) {
    const std::int64_t chunkRows = landingChunkRows(rowBytes);
    CHECK(chunkRows >= 1);
    for (const std::int64_t tokens : {0, 1, 7, 8, 9, 4096}) {
      const std::int64_t chunks = landingChunks(tokens, chunkRows);
      CHECK(chunks * chunkRows >= tokens);
      CHECK((chunks - 1) * chunkRows < std::max<std::int64_t>(tokens, 1));
      const std::int64_t flags = landingFlags(tokens, chunkRows);
      CHECK(landingFlag(chunks - 1, Landed::weights) == flags - 1);
      CHECK(landingFlagBytes(3, tokens, chunkRows) ==
            static_cast<std::size_t>(3 * flags) * sizeof(std::uint64_t));
    }
  }
}

}  // namespace
}  // namespace mscclpp_ep::cuda
