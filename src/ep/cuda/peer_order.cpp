// SPDX-License-Identifier: MIT
#include "cuda/peer_order.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/damage.hpp"
#include "core/memory_map.hpp"
#include "core/packets.hpp"
#include "cuda/kernels.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::cuda {

namespace {

// The first that a transport gives.
constexpr std::uint32_t kSignalSegment = 1;

const char* describe(Word word) {
  switch (word) {
    case Word::entered:
      return "the entry into the operation";
    case Word::finished:
      return "the end of the operation";
    case Word::firstRow:
      return "the counts";
    default:
      return "the rows";
  }
}

std::uint64_t nanoseconds(double seconds) {
  constexpr double kMost = 9e18;  // far from the end of 64 bits
  return static_cast<std::uint64_t>(std::min(seconds * 1e9, kMost));
}

/// The GPU whose memory it is; -1: one that is not known here.
int deviceOf(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) == cudaSuccess) return attributes.device;
  (void)cudaGetLastError();
  return -1;
}

}  // namespace

PeerOrder::PeerOrder(Transport& transport, std::uint64_t firstEpoch,
                     std::chrono::duration<double> timeout, bool shrink)
    : flagsAt_(alignUp(SignalMap(transport.size()).bytes(), kCacheLine)),
      signals_(transport.share(flagsAt_ + kFlagBytes + kPacketBytes)),
      epoch_(1),
      blocksDone_(1),
      damaged_(1),
      peers_(static_cast<std::size_t>(transport.size())),
      timeout_(timeout.count()) {
  // Before the ranks connect, and so before any kernel of a peer's raises a word.
  EP_CUDA_TRY(cudaMemset(signals_.data, 0, flagsAt_ + kFlagBytes + kPacketBytes),
              "cannot clear the words of the ranks");
  EP_CUDA_TRY(cudaDeviceSynchronize(), "cannot clear the words of the ranks");
  // 0 says that the buffer has failed.
  epoch_.write({std::max<std::uint64_t>(firstEpoch, 1)});
  blocksDone_.write({0U});
  damaged_.write({0U});
  order_.epoch = epoch_.get();
  order_.blocksDone = blocksDone_.get();
  order_.damaged = damaged_.get();
  order_.own = reinterpret_cast<std::uint64_t*>(signals_.data);
  order_.peers = peers_.get();
  order_.rank = transport.rank();
  order_.numRanks = transport.size();
  order_.timeout = nanoseconds(timeout_);
  order_.abort = abort_.get();
  order_.failure = failure_.get();
  if (!shrink) return;
  shrinkMemory_ = std::make_unique<ShrinkMemory>(static_cast<std::size_t>(transport.size()));
  order_.shrinking = shrinkMemory_->arguments.get();
}

void PeerOrder::connect(Transport& transport) {
  const std::size_t bytes = SignalMap(transport.size()).bytes();
  std::vector<std::uint64_t*> peers;
  for (int peer = 0; peer < transport.size(); ++peer) {
    std::byte* words = peer == transport.rank()
                           ? signals_.data
                           : transport.peerMemory(peer, kSignalSegment, 0, bytes);
    peers.push_back(reinterpret_cast<std::uint64_t*>(words));
  }
  peers_.write(peers);
  order_.linked = std::ranges::any_of(
      peers, [own = deviceOf(signals_.data)](const auto* words) { return deviceOf(words) != own; });
}

ArenaBlock PeerOrder::part(std::size_t offset) const {
  return {{signals_.data + offset, [owner = signals_.owner](std::byte*) {}},
          {Access::straight, kSignalSegment, offset}};
}

std::uint64_t PeerOrder::readEpoch() const {
  std::uint64_t epoch = 0;
  doNow([&](cudaStream_t stream) {
    EP_CUDA_TRY(
        cudaMemcpyAsync(&epoch, epoch_.get(), sizeof(epoch), cudaMemcpyDeviceToHost, stream),
        "cannot read the epoch of the GPU");
  });
  return epoch;
}

void PeerOrder::writeEpoch(std::uint64_t epoch, cudaStream_t stream) const {
  std::int32_t halves[2];
  static_assert(sizeof(halves) == sizeof(epoch));
  std::memcpy(halves, &epoch, sizeof(epoch));
  storeValues(reinterpret_cast<std::int32_t*>(epoch_.get()), halves, 2, stream);
}

void PeerOrder::throwIfFailed() const {
  const std::uint64_t epoch = acquire(failure_->epoch);
  if (epoch == 0) return;
  const auto word = static_cast<Word>(failure_->word);
  if (word == Word::intact) {
    throw PeerFailure(cat("operation ", epoch, " of the GPU's on rank ", order_.rank, ": ",
                          describeDamage(failure_->expected, failure_->sent)));
  }
  const std::string what =
      cat("operation ", epoch, " of the GPU's waited for ", describe(word), " of rank ",
          failure_->peer, ", and saw operation ", signalTag(failure_->seen));
  if (failure_->aborted != 0) throw PeerFailure(cat(what, " when the buffer was given up"));
  throw Timeout(cat(what, " after ", timeout_, " s (the buffer's timeout)"));
}

}  // namespace mscclpp_ep::cuda
