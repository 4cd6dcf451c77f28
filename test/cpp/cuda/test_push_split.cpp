// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <initializer_list>

#include "cuda/push_split.hpp"

namespace mscclpp_ep::cuda {
namespace {

TEST_CASE("every block has work, and every group a block") {
  for (int blocks = 1; blocks <= 132; ++blocks) {
    for (const PushLoad load : {PushLoad{0, 0}, PushLoad{1, 0}, PushLoad{0, 1}, PushLoad{1, 1},
                                PushLoad{1, 1000}, PushLoad{1000, 1}}) {
      const PushSplit split = splitBlocks(blocks, load);
      CAPTURE(blocks);
      CHECK(split.blocks == blocks);
      bool peers = false;
      bool own = false;
      for (int block = 0; block < blocks; ++block) {
        CHECK((split.servesPeers(block) || split.servesOwn(block)));
        peers |= split.servesPeers(block);
        own |= split.servesOwn(block);
      }
      CHECK(peers);
      CHECK(own);
    }
  }
}

TEST_CASE("rows that were not seen have blocks of both kinds") {
  for (const PushLoad load : {PushLoad{0, 5}, PushLoad{5, 0}, PushLoad{0, 0}}) {
    const PushSplit split = splitBlocks(16, load);
    CHECK(split.peerBlocks == 16);
    CHECK(split.ownBlocks == 16);
  }
}

TEST_CASE("two ranks share enough blocks half and half, and with few each does both") {
  const PushLoad even{1, 1};
  CHECK(splitBlocks(16, even).peerBlocks == 8);
  CHECK(splitBlocks(16, even).ownBlocks == 8);
  CHECK(splitBlocks(8, even).peerBlocks == 8);
  CHECK(splitBlocks(8, even).ownBlocks == 8);
}

TEST_CASE("of eight ranks most rows are for others, and so are most blocks") {
  const PushSplit split = splitBlocks(16, {1, 7});
  CHECK(split.peerBlocks == 14);
  CHECK(split.ownBlocks == 2);
}

}  // namespace
}  // namespace mscclpp_ep::cuda
