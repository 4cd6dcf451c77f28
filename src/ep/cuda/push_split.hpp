// SPDX-License-Identifier: MIT
// How the blocks of a kernel that pushes rows are shared out between the link to peers and this
// GPU's own memory.
#ifndef MSCCLPP_EP_CUDA_PUSH_SPLIT_HPP_
#define MSCCLPP_EP_CUDA_PUSH_SPLIT_HPP_

namespace mscclpp_ep::cuda {

/// Rows that this rank has for itself, and for all others; only their ratio counts.
struct PushLoad {
  float own = 0.0F;
  float peers = 0.0F;
};

/// The first blocks push rows to peers, the last ones to this rank; all of them do both where they
/// are not split. Every group has a block, also where no row is known of.
struct PushSplit {
  int blocks = 1;
  int peerBlocks = 1;
  int ownBlocks = 1;

  constexpr bool servesPeers(int block) const { return block < peerBlocks; }
  constexpr bool servesOwn(int block) const { return block >= blocks - ownBlocks; }
};

// Times in units of what a block takes to push a row over the link, as measured on H100 with rows
// of 14 KiB: 0.33 us, or 0.29 us within this GPU's memory. A row that is for both is read once, and
// takes 0.55 us.
inline constexpr float kPeerTime = 1.0F;
inline constexpr float kOwnTime = 0.9F;
inline constexpr float kTimeSaved = 0.2F;
/// The link carries what so many blocks push that do nothing else, and less if blocks do both.
inline constexpr float kLinkBlocks = 8.0F;
inline constexpr float kLinkBlocksMixed = 6.7F;

constexpr float lesser(float a, float b) { return a < b ? a : b; }
constexpr float greater(float a, float b) { return a > b ? a : b; }

/// What a kernel takes whose blocks are split.
constexpr float timeOf(const PushSplit& split, const PushLoad& load) {
  const float peers =
      load.peers * kPeerTime / lesser(static_cast<float>(split.peerBlocks), kLinkBlocks);
  return greater(peers, load.own * kOwnTime / static_cast<float>(split.ownBlocks));
}

/// What it takes if every block does both.
constexpr float timeMixed(int blocks, const PushLoad& load) {
  const float time =
      load.peers * kPeerTime + load.own * kOwnTime - lesser(load.peers, load.own) * kTimeSaved;
  return greater(time / static_cast<float>(blocks), load.peers * kPeerTime / kLinkBlocksMixed);
}

/// Shares the blocks out by rows, if that takes less time than if each does both.
constexpr PushSplit splitBlocks(int blocks, const PushLoad& load) {
  const PushSplit mixed{blocks, blocks, blocks};
  if (blocks < 2 || load.peers <= 0.0F || load.own <= 0.0F) return mixed;
  const float part = load.peers / (load.peers + load.own);
  const auto share = static_cast<int>(static_cast<float>(blocks) * part + 0.5F);
  const int peerBlocks = share < 1 ? 1 : share < blocks ? share : blocks - 1;
  const PushSplit split{blocks, peerBlocks, blocks - peerBlocks};
  return timeOf(split, load) < timeMixed(blocks, load) ? split : mixed;
}

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_PUSH_SPLIT_HPP_
