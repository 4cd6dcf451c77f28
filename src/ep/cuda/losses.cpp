// SPDX-License-Identifier: MIT
#include "cuda/losses.hpp"

#include "cuda/await.hpp"

namespace mscclpp_ep::cuda {

Losses::Losses(PeerOrder& order, Transport& transport, Arena& arena)
    : order_(order),
      transport_(transport),
      arena_(arena),
      byHand_(static_cast<std::size_t>(transport.size())),
      onGpu_(byHand_),
      known_(byHand_) {}

void Losses::learn() {
  endWaits();
  // What an operation has lost it has told before its end: one that has ended by now has told all.
  std::size_t numEnded = 0;
  while (numEnded < operations_.size() && operations_[numEnded].done.passed()) ++numEnded;
  if (learnRanks()) {
    for (const Operation& operation : operations_) quarantine(operation.written);
    quarantine(captured_);
  }
  for (; numEnded > 0; --numEnded) operations_.pop_front();
}

void Losses::settleLanding(const std::function<void()>& look) {
  for (const Operation& operation : operations_) {
    if (operation.written.landing) awaitWatching([&] { return operation.done.passed(); }, look);
  }
  learn();
}

/// True if one of them may still write to this rank's memory.
bool Losses::learnRanks() {
  bool mayWrite = false;
  for (int rank = 0; rank < transport_.size(); ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    if (known_[at] || !order_.hasLost(rank)) continue;
    known_[at] = onGpu_[at] = true;
    if (!transport_.masked(rank)) transport_.setMask(rank, true);
    mayWrite = mayWrite || transport_.mayStillWrite(rank);
  }
  return mayWrite;
}

void Losses::quarantine(const PeerWritten& written) {
  for (const void* block : written.blocks) arena_.quarantine(block);
  if (written.landing) arena_.abandonLanding();
}

/// Kernels need not wait until the time is up for a rank of which the host knows more.
void Losses::endWaits() {
  for (int rank = 0; rank < transport_.size(); ++rank) {
    const bool gone = transport_.masked(rank) && !byHand_[static_cast<std::size_t>(rank)];
    if (gone) order_.setGone(rank, true);
  }
}

void Losses::watch() {
  transport_.maskFailed();
  endWaits();
}

/// While a graph is captured, what belongs to the buffer and not to the graph is done at once.
template <typename Enqueue>
void Losses::enqueue(cudaStream_t stream, bool capturing, const Enqueue& work) const {
  capturing ? doNow(work) : work(stream);
}

void Losses::tell(cudaStream_t stream, bool capturing) {
  endWaits();
  for (int rank = 0; rank < transport_.size(); ++rank) {
    const auto at = static_cast<std::size_t>(rank);
    if (!transport_.masked(rank) || onGpu_[at]) continue;
    enqueue(stream, capturing,
            [&](cudaStream_t on) { setLost(order_.arguments(), rank, true, on); });
    onGpu_[at] = true;
  }
}

void Losses::note(PeerWritten written, cudaStream_t stream, bool capturing) {
  if (!capturing) {
    operations_.emplace_back(std::move(written), stream);
    return;
  }
  captured_.landing = captured_.landing || written.landing;
  for (const void* block : written.blocks) {
    if (capturedBlocks_.insert(block).second) captured_.blocks.push_back(block);
  }
}

void Losses::set(int rank, bool masked) {
  const auto at = static_cast<std::size_t>(rank);
  if (!masked) {
    aligns_ = aligns_ || onGpu_[at];
    order_.forgetLoss(rank);
    order_.setGone(rank, false);
  }
  known_[at] = known_[at] && masked;
  byHand_[at] = masked;
  if (onGpu_[at] == masked) return;
  doNow([&](cudaStream_t on) { setLost(order_.arguments(), rank, masked, on); });
  onGpu_[at] = masked;
}

void Losses::align(std::uint64_t highest, cudaStream_t stream, bool capturing) {
  if (highest == 0) return;
  // Words of the epoch that was told may be left of when the ranks parted, and kernels look back by
  // one.
  enqueue(stream, capturing, [&](cudaStream_t on) { order_.writeEpoch(highest + 2, on); });
  aligns_ = false;
}

}  // namespace mscclpp_ep::cuda
