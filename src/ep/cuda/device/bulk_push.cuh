// SPDX-License-Identifier: MIT
// Pushes chunks of rows by bulk copies: one warp of a block loads, one stores, one raises flags.
#ifndef MSCCLPP_EP_CUDA_DEVICE_BULK_PUSH_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_BULK_PUSH_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/device/chunks.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/device/visit.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

inline constexpr int kPushWarps = 3;
/// Chunks are copied in pieces, which do not end with rows.
inline constexpr int kMostPieces = 32;
/// Stores of pieces that may be reading shared memory while the next is issued. Rings have at least
/// two places more.
inline constexpr int kStoresReading = 3;
/// Stores of pieces that may be on their way to the peer while the next is issued: what a chunk's
/// flag lags behind its rows.
inline constexpr int kStoresLanding = 4;
/// Chunks that have landed, but have no flag yet: at most a warp's width.
inline constexpr int kQueueLength = 16;

struct BulkPush {
  PushContext context;
  std::int32_t pieceBytes = 0;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

struct alignas(16) Piece {
  std::byte* to = nullptr;
  std::uint32_t bytes = 0;   ///< 0: there are no more pieces
  std::int32_t ticket = -1;  ///< of the chunk, if this is the last piece of one
};

/// A chunk that has been stored, and the number of pieces up to its last.
struct StoredChunk {
  std::int32_t pieces = 0;
  std::int32_t ticket = 0;
};

struct PushRing {
  RingBarriers<kMostPieces> barriers;
  Piece pieces[kMostPieces];
  StoredChunk stored[kMostPieces];  ///< those that are not known to have landed: the storing warp's
  RingBarriers<kQueueLength> queue;
  std::int32_t landed[kQueueLength];  ///< tickets; negative: there are no more

  /// Called by a warp.
  __device__ void init(int numPieces) {
    barriers.initByWarp(numPieces, 1);
    queue.initByWarp(kQueueLength, 1);
  }
};

/// Loads pieces of chunks for as long as there are tickets: from this rank's memory, whether the
/// peers have begun or not. Called by one warp.
__device__ inline void loadPieces(const BulkPush& push, PushRing& ring, std::byte* stages) {
  const PushPlan<Landed::rows> plan(push.context);
  if (laneIndex() != 0) return;
  RingPosition at(ring.barriers.size);
  std::int64_t ticket = plan.draw();
  while (ticket < plan.count()) {
    const std::int64_t next = plan.draw();  // ahead of when it is needed
    const Chunks chunk = plan[ticket];
    for (std::int64_t done = 0; done < chunk.bytes; done += push.pieceBytes) {
      const std::int64_t left = chunk.bytes - done;
      const bool last = left <= push.pieceBytes;
      const auto bytes = static_cast<std::uint32_t>(last ? left : push.pieceBytes);
      std::uint64_t* full = &ring.barriers.full[at.place()];
      ring.barriers.awaitEmpty(at);
      ring.pieces[at.place()] = {chunk.to + done, bytes,
                                 last ? static_cast<std::int32_t>(ticket) : -1};
      arriveExpecting(full, bytes);
      bulkLoad(stages + at.place() * push.pieceBytes, chunk.from + done, bytes, full);
      at.advance();
    }
    ticket = next;
  }
  plan.end(ticket);
  ring.barriers.awaitEmpty(at);
  ring.pieces[at.place()] = {};
  arrive(&ring.barriers.full[at.place()]);
}

/// Keeps account of chunks from when they have been stored until they have landed, and tells the
/// flag warp then.
class LandingQueue {
 public:
  __device__ explicit LandingQueue(PushRing& ring) : ring_(ring), at_(kQueueLength) {}

  /// The chunk whose last piece is the `pieces`th has been stored.
  __device__ void add(std::int32_t pieces, std::int32_t ticket) {
    ring_.stored[end_++ % kMostPieces] = {pieces, ticket};
    if (end_ == first_ + 1) next_ = pieces;
  }
  /// Whether a chunk waits whose last piece is among the first so many.
  __device__ bool has(std::int32_t pieces) const { return first_ != end_ && next_ <= pieces; }
  /// So many pieces have landed.
  __device__ void landed(std::int32_t pieces) {
    while (has(pieces)) {
      tell(ring_.stored[first_++ % kMostPieces].ticket);
      next_ = ring_.stored[first_ % kMostPieces].pieces;
    }
  }
  __device__ void tell(std::int32_t ticket) {
    ring_.queue.awaitEmpty(at_);
    ring_.landed[at_.place()] = ticket;
    arrive(&ring_.queue.full[at_.place()]);
    at_.advance();
  }
  __device__ void end() { tell(-1); }

 private:
  PushRing& ring_;
  RingPosition at_;
  unsigned first_ = 0;
  unsigned end_ = 0;
  std::int32_t next_ = 0;  ///< pieces of the first
};

/// Waits for the last pieces, but `kLeft`, and then for the others one by one.
template <int kLeft>
__device__ __forceinline__ void awaitLast(LandingQueue& queue, std::int32_t pieces) {
  bulkAwaitStoresBut<kLeft>();
  queue.landed(pieces - kLeft);
  if constexpr (kLeft > 0) awaitLast<kLeft - 1>(queue, pieces);
}

/// Stores the pieces that have been loaded, once the peers have begun. If one of them does not,
/// nothing is stored or flagged, but places are emptied all the same. Called by one warp.
__device__ inline void storePieces(const BulkPush& push, const Order& order, std::uint64_t epoch,
                                   PushRing& ring, const std::byte* stages) {
  const bool entered = awaitPeers(order, epoch);
  if (laneIndex() != 0) return;
  fenceGlobalProxy();
  RingPosition at(ring.barriers.size);
  RingPosition read(ring.barriers.size);
  LandingQueue queue(ring);
  std::int32_t stored = 0;
  for (;;) {
    ring.barriers.awaitFull(at);
    const Piece piece = ring.pieces[at.place()];
    if (piece.bytes == 0) break;
    if (entered) bulkStore(piece.to, stages + at.place() * push.pieceBytes, piece.bytes);
    bulkCommit();
    at.advance();
    if (stored++ >= kStoresReading) {
      bulkAwaitReads<kStoresReading>();
      arrive(&ring.barriers.empty[read.place()]);
      read.advance();
    }
    if (entered && piece.ticket >= 0) queue.add(stored, piece.ticket);
    if (queue.has(stored - kStoresLanding)) {
      bulkAwaitStoresBut<kStoresLanding>();
      queue.landed(stored - kStoresLanding);
    }
  }
  awaitLast<kStoresLanding>(queue, stored);
  queue.end();
}

/// Raises the flags of chunks whose rows have landed: by a warp of its own, as a release takes as
/// long as some pieces, and of all that have landed by then at once, a lane each. What the storing
/// thread has waited for comes before the release, since it has told of it through a barrier.
__device__ inline void raiseFlags(const BulkPush& push, std::uint64_t epoch, PushRing& ring) {
  const PushPlan<Landed::rows> plan(push.context);
  RingPosition at(kQueueLength);
  for (bool more = true; more;) {
    ring.queue.awaitFull(at);
    // This lane's is the place behind those of the lanes before it.
    RingPosition mine = at;
    for (int i = 0; i < laneIndex() && i < kQueueLength; ++i) mine.advance();
    const bool full = laneIndex() < kQueueLength && ring.queue.isFull(mine);
    const unsigned gaps = ~__ballot_sync(kAllLanes, full);
    const int count = __ffs(static_cast<int>(gaps)) - 1;
    const std::int32_t ticket = laneIndex() < count ? ring.landed[mine.place()] : 0;
    if (laneIndex() < count && ticket >= 0) storeRelease(plan[ticket].flag, epoch);
    more = __all_sync(kAllLanes, ticket >= 0);
    if (laneIndex() < count) arrive(&ring.queue.empty[mine.place()]);
    for (int i = 0; i < count; ++i) at.advance();
  }
}

/// Does what the `warp`th of kPushWarps does.
__device__ inline void pushChunks(const BulkPush& push, const Order& order, std::uint64_t epoch,
                                  PushRing& ring, std::byte* stages, int warp) {
  if (warp == 0) return loadPieces(push, ring, stages);
  if (warp == 1) return storePieces(push, order, epoch, ring, stages);
  raiseFlags(push, epoch, ring);
}

#endif

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_BULK_PUSH_CUH_
