// SPDX-License-Identifier: MIT
// Pushes chunks of rows by bulk copies: one warp of a block loads, one stores, one raises flags.
#ifndef MSCCLPP_EP_CUDA_DEVICE_BULK_PUSH_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_BULK_PUSH_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/device/chunks.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

inline constexpr int kPushWarps = 3;
/// Chunks are copied in pieces, which do not end with rows.
inline constexpr int kMostPieces = 32;
inline constexpr int kLeastPieces = 5;
/// Stores of pieces that may be reading shared memory while the next is issued.
inline constexpr int kStoresReading = 3;
/// Stores of pieces that may be on their way to the peer while the next is issued: what a chunk's
/// flag lags behind its rows.
inline constexpr int kStoresLanding = 8;
/// Chunks that have landed, but have no flag yet.
inline constexpr int kQueueLength = 4;

struct BulkPush {
  PushContext context;
  std::int32_t pieceBytes = 0;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

struct Piece {
  std::byte* to = nullptr;  ///< null: there are no more
  std::uint32_t bytes = 0;
  bool endsChunk = false;
  std::int64_t ticket = 0;
};

struct PushRing {
  RingBarriers<kMostPieces> barriers;
  /// By number of the piece: longer than the ring, as they are looked at once more when the piece
  /// has landed.
  static constexpr int kRecords = 2 * kMostPieces;
  static_assert(kStoresLanding <= kMostPieces && kStoresReading + 2 <= kLeastPieces);
  Piece records[kRecords];
  RingBarriers<kQueueLength> queue;
  std::int64_t landed[kQueueLength];  ///< tickets; negative: there are no more

  __device__ void init(int numPieces) {
    barriers.init(numPieces, 1);
    queue.init(kQueueLength, 1);
  }
  __device__ Piece& record(std::int64_t number) { return records[number % kRecords]; }
};

/// Loads pieces of chunks for as long as there are tickets. Called by one warp.
__device__ inline void loadPieces(const BulkPush& push, PushRing& ring, std::byte* stages) {
  const ChunkPlan plan(push.context);
  if (laneIndex() != 0) return;
  RingPosition at(ring.barriers.size);
  std::int64_t number = 0;
  for (std::int64_t ticket = plan.draw(); ticket < plan.count();) {
    const std::int64_t next = plan.draw();  // ahead of when it is needed
    const Chunk chunk = plan[ticket];
    for (std::int64_t done = 0; done < chunk.bytes; done += push.pieceBytes) {
      const std::int64_t left = chunk.bytes - done;
      const bool last = left <= push.pieceBytes;
      const auto bytes = static_cast<std::uint32_t>(last ? left : push.pieceBytes);
      ring.barriers.awaitEmpty(at);
      ring.record(number++) = {chunk.to + done, bytes, last, ticket};
      arriveExpecting(&ring.barriers.full[at.place()], bytes);
      bulkLoad(stages + static_cast<std::int64_t>(at.place()) * push.pieceBytes, chunk.rows + done,
               bytes, &ring.barriers.full[at.place()]);
      at.advance();
    }
    ticket = next;
  }
  ring.barriers.awaitEmpty(at);
  ring.record(number) = {};
  arrive(&ring.barriers.full[at.place()]);
}

/// Tells the flag warp of chunks whose rows have landed.
class LandedQueue {
 public:
  __device__ explicit LandedQueue(PushRing& ring) : ring_(ring), at_(kQueueLength) {}
  __device__ void push(std::int64_t ticket) {
    ring_.queue.awaitEmpty(at_);
    ring_.landed[at_.place()] = ticket;
    arrive(&ring_.queue.full[at_.place()]);
    at_.advance();
  }
  __device__ void noteLanded(std::int64_t piece) {
    const Piece& record = ring_.record(piece);
    if (record.endsChunk) push(record.ticket);
  }

 private:
  PushRing& ring_;
  RingPosition at_;
};

/// Stores the pieces that have been loaded. Called by one warp.
__device__ inline void storePieces(const BulkPush& push, PushRing& ring, const std::byte* stages) {
  if (laneIndex() != 0) return;
  RingPosition at(ring.barriers.size);
  RingPosition read(ring.barriers.size);
  LandedQueue landed(ring);
  std::int64_t number = 0;
  for (;; ++number) {
    ring.barriers.awaitFull(at);
    const Piece piece = ring.record(number);
    if (piece.to == nullptr) break;
    bulkStore(piece.to, stages + static_cast<std::int64_t>(at.place()) * push.pieceBytes,
              piece.bytes);
    bulkCommit();
    at.advance();
    if (number >= kStoresReading) {
      bulkAwaitReads<kStoresReading>();
      arrive(&ring.barriers.empty[read.place()]);
      read.advance();
    }
    if (number >= kStoresLanding) {
      bulkAwaitStoresBut<kStoresLanding>();
      landed.noteLanded(number - kStoresLanding);
    }
  }
  bulkAwaitStores();
  const std::int64_t first = number < kStoresLanding ? 0 : number - kStoresLanding;
  for (std::int64_t piece = first; piece < number; ++piece) landed.noteLanded(piece);
  landed.push(-1);
}

/// Pushes the weights of chunks whose rows have landed, and raises their flags: by a warp of its
/// own, as a release takes as long as some pieces. What the storing thread has waited for comes
/// before the release, since it has told of it through a barrier.
__device__ inline void raiseFlags(const BulkPush& push, std::uint64_t epoch, PushRing& ring) {
  const ChunkPlan plan(push.context);
  for (RingPosition at(kQueueLength);; at.advance()) {
    ring.queue.awaitFull(at);
    const std::int64_t ticket = ring.landed[at.place()];
    if (ticket < 0) return;
    const Chunk chunk = plan[ticket];
    pushWeights(chunk, laneIndex(), kWarpSize);
    __syncwarp();
    if (laneIndex() == 0) {
      storeRelease(chunk.flag, epoch);
      arrive(&ring.queue.empty[at.place()]);
    }
    __syncwarp();
  }
}

/// Does what the `warp`th of kPushWarps does.
__device__ inline void pushChunks(const BulkPush& push, std::uint64_t epoch, PushRing& ring,
                                  std::byte* stages, int warp) {
  if (warp == 0) return loadPieces(push, ring, stages);
  if (warp == 1) return storePieces(push, ring, stages);
  raiseFlags(push, epoch, ring);
}

#endif

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_BULK_PUSH_CUH_
