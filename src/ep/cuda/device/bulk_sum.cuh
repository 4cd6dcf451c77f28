// SPDX-License-Identifier: MIT
// Sums of rows that bulk copies bring into shared memory: one warp of a block loads, others sum.
#ifndef MSCCLPP_EP_CUDA_DEVICE_BULK_SUM_CUH_
#define MSCCLPP_EP_CUDA_DEVICE_BULK_SUM_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/device/row_parts.cuh"
#include "cuda/device/summands.cuh"
#include "cuda/device/visit.cuh"
#include "cuda/device/warp.cuh"

namespace mscclpp_ep::cuda {

// A block has pipes, each of a warp that loads and some that sum: one alone has more latencies than
// it can hide. Then come other warps.
inline constexpr int kPipes = 2;
inline constexpr int kPipeWarps = 1 + kSumWarps;

inline constexpr int kMostStages = 32;
/// Of shorter rows plain loads of many warps sum more: a row costs about as much as 6 KB of bytes.
inline constexpr std::int64_t kLeastBulkRowBytes = 6144;

struct BulkSum {
  SumContext context;
  RowParts parts;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

/// What the summing warps are told of a row.
struct RowNote {
  /// Of which of the pipe's items it is, as a number from 0 on. Their number: there are no more.
  std::int32_t item;
  /// This row and those of the same item that are sure to follow; negative if these are all.
  std::int32_t run;
};

/// Rows on their way from the warp that loads to those that sum.
struct SumRing {
  RingBarriers<kMostStages> barriers;
  RowNote notes[kMostStages];

  /// Called by a warp.
  __device__ void init(int numStages) { barriers.initByWarp(numStages, kSumWarps); }
};

/// Goes over the summands of the block's items in the order of their summation, a warp's width at a
/// time, of which each lane has one.
class SummandScan {
 public:
  __device__ SummandScan(const BulkSum& sum, const ItemRange& items)
      : sum_(sum), items_(items), count_(sum.context.rows.count()) {
    item_ = laneIndex() / count_;
    index_ = laneIndex() % count_;
    prefetch();
  }

  /// Whether any lane has one still.
  __device__ bool more() const { return __any_sync(kAllLanes, item_ < items_.count); }
  /// Whether all summands of this lane's item are now with some lane.
  __device__ bool hasWholeItem() const {
    return index_ <= laneIndex() && laneIndex() - index_ + count_ <= kWarpSize;
  }
  /// This lane's summand and its item; goes on to the next.
  template <bool kLanded>
  __device__ Summand take(std::int64_t& item, Part& part) {
    item = item_;
    part = part_;
    const Summand found = locate<kLanded, false>(sum_.context, part_.token, index_, ordinal_);
    item_ += kWarpSize / count_;
    index_ += kWarpSize % count_;
    if (index_ >= count_) {
      index_ -= count_;
      ++item_;
    }
    prefetch();
    return found;
  }

 private:
  /// What is in memory of the summand, ahead of the time when it is needed.
  __device__ void prefetch() {
    ordinal_ = -1;
    if (item_ >= items_.count) return;
    part_ = Part::of(sum_.parts, items_[item_]);
    ordinal_ = loadOrdinal(sum_.context.rows, part_.token, index_);
  }

  const BulkSum& sum_;
  const ItemRange& items_;
  const int count_;
  std::int64_t item_;
  int index_;
  Part part_;
  std::int32_t ordinal_;
};

/// Waits until the summing warps have read all rows, of which there is none at `at`. Called by one
/// thread.
__device__ inline void awaitRead(SumRing& ring, RingPosition at) {
  for (int i = 1; i < ring.barriers.size; ++i) {
    at.advance();
    ring.barriers.awaitEmpty(at);
  }
}

/// Loads the rows of the pipe's items. With `kLanded`, does not wait for rows any more once one has
/// not come. Called by a warp, whose first lane issues all loads.
template <bool kLanded>
__device__ void loadSummands(const BulkSum& sum, const ItemRange& items, std::uint64_t epoch,
                             SumRing& ring, std::byte* stages) {
  RingPosition at(ring.barriers.size);
  bool waits = kLanded;
  SummandScan scan(sum, items);
  // If a peer does not come, nothing is read, and what is summed is of no use.
  const bool reads = kLanded || awaitPeers(sum.context.order, epoch);
  fenceGlobalProxy();
  while (reads && scan.more()) {
    std::int64_t item = 0;
    Part part;
    const bool inBatch = scan.hasWholeItem();
    const Summand mine = scan.template take<kLanded>(item, part);
    const unsigned present = __ballot_sync(kAllLanes, mine.row != nullptr);
    const unsigned ofItem = __match_any_sync(kAllLanes, static_cast<std::int32_t>(item)) & present;
    const int rest = __popc(ofItem >> laneIndex());
    const bool isWhole = inBatch && (ofItem & ((1u << laneIndex()) - 1)) == 0;
    const int run = isWhole ? -rest : rest;
    unsigned landed = waits ? 0 : kAllLanes;
    for (unsigned lanes = present; lanes != 0; at.advance()) {
      const int lane = takeLowest(lanes);
      if (kLanded && (landed >> lane & 1u) == 0) {
        landed = awaitLanes(sum.context.order, epoch, mine, 1u << lane);
        waits = landed != 0;
        if (!waits) landed = kAllLanes;
        __syncwarp();
        fenceGlobalProxy();
      }
      const std::byte* from = broadcast(mine.row + part.offset, lane);
      const std::uint32_t bytes = __shfl_sync(kAllLanes, part.bytes, lane);
      const RowNote note{__shfl_sync(kAllLanes, static_cast<std::int32_t>(item), lane),
                         __shfl_sync(kAllLanes, run, lane)};
      if (laneIndex() == 0) {
        // Those that summed what was here have read it; what follows cannot overtake that.
        ring.barriers.awaitEmpty(at);
        ring.notes[at.place()] = note;
        arriveExpecting(&ring.barriers.full[at.place()], bytes);
        bulkLoad(stages + at.place() * sum.parts.partBytes, from, bytes,
                 &ring.barriers.full[at.place()]);
      }
      __syncwarp();
    }
  }
  if (laneIndex() != 0) return;
  ring.barriers.awaitEmpty(at);
  ring.notes[at.place()] = {static_cast<std::int32_t>(items.count), 1};
  arrive(&ring.barriers.full[at.place()]);
  if (!kLanded) awaitRead(ring, at);
}

/// What a summing thread works on: its vectors of a part, kSumThreads apart.
struct ThreadPart {
  std::byte* out = nullptr;  ///< where its first goes
  std::int32_t left = 0;     ///< bytes from its first to the end of the part

  static constexpr std::int32_t kApart = kSumThreads * kVectorBytes;
  __device__ __forceinline__ bool has(int i) const { return i * kApart < left; }
  __device__ static ThreadPart of(const BulkSum& sum, std::int64_t item, int thread) {
    const Part part = Part::of(sum.parts, item);
    const auto skip = static_cast<std::int32_t>(thread * kVectorBytes);
    return {sum.context.out + part.token * sum.parts.rowBytes + part.offset + skip,
            static_cast<std::int32_t>(part.bytes) - skip};
  }
};

/// The sum of a part, of which each of the summing threads has some vectors.
template <class Element>
struct PartSum {
  using Vector = Words<kVectorBytes>;
  static constexpr int kAhead = 2;  ///< vectors of each row that are loaded before they are added
  using Sum = VectorSum<Element, Vector>;
  Sum vectors[kPartVectors];

  __device__ __forceinline__ void fill(float start) {
#pragma unroll
    for (int i = 0; i < kPartVectors; ++i) vectors[i].fill(start);
  }

  /// Loads this thread's vectors of some rows, and gives those of each to `use`, in order.
  template <int kRows, class Use>
  static __device__ __forceinline__ void forVectors(const ThreadPart& part,
                                                    const std::byte* const (&rows)[kRows],
                                                    const Use& use) {
#pragma unroll
    for (int first = 0; first < kPartVectors; first += kAhead) {
      Vector loaded[kAhead][kRows];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (!part.has(first + i)) continue;
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          loaded[i][row].loadShared(rows[row] + (first + i) * ThreadPart::kApart);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (part.has(first + i)) use(first + i, loaded[i]);
      }
    }
  }

  template <int kRows>
  static __device__ __forceinline__ void addAll(Sum& sum, const Vector (&loaded)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) sum.add(loaded[row]);
  }

  /// Adds rows, from this thread's first vector on, in their order.
  template <int kRows>
  __device__ __forceinline__ void add(const ThreadPart& part,
                                      const std::byte* const (&rows)[kRows]) {
    forVectors(part, rows,
               [this](int i, const Vector(&loaded)[kRows]) { addAll(vectors[i], loaded); });
  }

  __device__ __forceinline__ void store(const ThreadPart& part) const {
#pragma unroll
    for (int i = 0; i < kPartVectors; ++i) {
      if (part.has(i)) vectors[i].store(part.out + i * ThreadPart::kApart);
    }
  }

  /// All of it at once, where these are all rows.
  template <int kRows>
  static __device__ __forceinline__ void sumWhole(const ThreadPart& part, float start,
                                                  const std::byte* const (&rows)[kRows]) {
    forVectors(part, rows, [&](int i, const Vector(&loaded)[kRows]) {
      Sum sum;
      sum.fill(start);
      addAll(sum, loaded);
      sum.store(part.out + i * ThreadPart::kApart);
    });
  }
};

/// Sums what the loading warp brings: one of the summing threads of a pipe. Two rows at a time
/// where there are two, and without sums in registers between where there are no more.
template <class Element>
class PartSummer {
 public:
  __device__ PartSummer(const BulkSum& sum, const ItemRange& items, SumRing& ring,
                        const std::byte* stages, int thread)
      : sum_(sum),
        items_(items),
        ring_(ring),
        rows_(stages + thread * kVectorBytes),
        stageBytes_(static_cast<std::uint32_t>(sum.parts.partBytes)),
        count_(static_cast<std::int32_t>(items.count)),
        thread_(thread),
        at_(ring.barriers.size) {}

  /// Writes the sums of all items. Called by whole warps.
  __device__ void run() {
    begin(0);
    for (;;) {
      const RowNote note = next();
      while (item_ < note.item) sumNone();
      if (item_ == count_) return;
      if (note.run == -1) {
        sumOne();
      } else if (note.run == -2) {
        sumTwo();
      } else {
        sumMany(note);
      }
      begin(item_ + 1);
    }
  }

 private:
  __device__ __forceinline__ void begin(std::int32_t item) {
    item_ = item;
    if (item < count_) part_ = ThreadPart::of(sum_, items_[item], thread_);
  }

  /// Waits for the next row.
  __device__ __forceinline__ RowNote next() {
    ring_.barriers.awaitFull(at_);
    return ring_.notes[at_.place()];
  }

  __device__ __forceinline__ const std::byte* row() const {
    return rows_ + at_.place() * stageBytes_;
  }

  /// Tells the loading warp that this warp has read a row.
  __device__ __forceinline__ void release(const RingPosition& at) {
    if (laneIndex() == 0) arrive(&ring_.barriers.empty[at.place()]);
  }

  /// Does something with the next row, which is there.
  template <class Function>
  __device__ __forceinline__ void withRow(const Function& function) {
    const std::byte* const rows[] = {row()};
    function(rows);
    __syncwarp();
    release(at_);
    at_.advance();
  }

  /// With the next two, of which the first is there.
  template <class Function>
  __device__ __forceinline__ void withTwoRows(const Function& function) {
    const RingPosition first = at_;
    const std::byte* const firstRow = row();
    at_.advance();
    ring_.barriers.awaitFull(at_);
    const std::byte* const rows[] = {firstRow, row()};
    function(rows);
    __syncwarp();
    release(first);
    release(at_);
    at_.advance();
  }

  __device__ __forceinline__ void sumNone() {
    PartSum<Element> result;
    result.fill(sum_.context.start);
    result.store(part_);
    begin(item_ + 1);
  }

  __device__ __forceinline__ void sumOne() {
    withRow([&](const auto& rows) {
      PartSum<Element>::template sumWhole<1>(part_, sum_.context.start, rows);
    });
  }

  __device__ __forceinline__ void sumTwo() {
    withTwoRows([&](const auto& rows) {
      PartSum<Element>::template sumWhole<2>(part_, sum_.context.start, rows);
    });
  }

  /// Any number, until there is a row of another item.
  __device__ __forceinline__ void sumMany(RowNote note) {
    PartSum<Element> result;
    result.fill(sum_.context.start);
    do {
      if (note.run == 1 || note.run == -1) {
        withRow([&](const auto& rows) { result.template add<1>(part_, rows); });
      } else {
        withTwoRows([&](const auto& rows) { result.template add<2>(part_, rows); });
      }
      note = next();
    } while (note.item == item_);
    result.store(part_);
  }

  const BulkSum& sum_;
  const ItemRange& items_;
  SumRing& ring_;
  const std::byte* rows_;  ///< this thread's first vector in the first stage
  const std::uint32_t stageBytes_;
  const std::int32_t count_;
  const int thread_;
  RingPosition at_;
  std::int32_t item_ = 0;  ///< that is being summed
  ThreadPart part_;
};

/// Does what the `warp`th of the warps of all pipes does.
template <class Element, bool kLanded>
__device__ void runPipe(const BulkSum& sum, std::int64_t block, std::int64_t blocks,
                        std::uint64_t epoch, SumRing* rings, std::byte* stages, int warp) {
  const int pipe = warp / kPipeWarps;
  SumRing& ring = rings[pipe];
  const ItemRange items = ItemRange::of(sum.parts.numItems, block + pipe * blocks, blocks * kPipes);
  std::byte* mine = stages + pipe * ring.barriers.size * sum.parts.partBytes;
  const int role = warp - pipe * kPipeWarps;
  if (role == 0) return loadSummands<kLanded>(sum, items, epoch, ring, mine);
  PartSummer<Element>(sum, items, ring, mine, (role - 1) * kWarpSize + laneIndex()).run();
}

#endif

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_DEVICE_BULK_SUM_CUH_
