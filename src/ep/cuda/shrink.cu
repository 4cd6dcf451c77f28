// SPDX-License-Identifier: MIT
#include <algorithm>

#include "cuda/device/order.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/summands.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/device/words.cuh"
#include "cuda/kernel_list.hpp"
#include "cuda/shrink.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

constexpr int kThreads = 256;

__device__ std::int64_t threadOfGrid() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ std::int64_t threadsOfGrid() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

unsigned blocksFor(int numSms) { return static_cast<unsigned>(std::max(numSms, 1)); }

__device__ Place placeOf(const EntryArguments& entry, int rank) {
  if (isLost(entry.order, rank)) return {kNoPlace, 0};
  Place place = entry.known[rank];
  if (entry.firstRows != nullptr) place.firstRow = entry.firstRows[rank];
  if (entry.numKeptFrom != nullptr) place.numKept = entry.numKeptFrom[rank];
  return place;
}

/// Whether a peer that has entered is in another operation than this rank.
__device__ bool isElsewhere(const Order& order, std::uint64_t epoch, int peer) {
  const std::uint64_t word =
      loadAcquire(order.own + SignalMap(order.numRanks).at(Word::entered, peer));
  return isOf(word, epoch) && signalValue(word) != order.operation;
}

__global__ void __launch_bounds__(kThreads)
    enterKernel(const __grid_constant__ EntryArguments entry) {
  const Order& order = entry.order;
  if (!enterPeers(order)) return;
  const std::uint64_t epoch = currentEpoch(order);
  for (int rank = threadIdx.x; rank < order.numRanks; rank += blockDim.x) {
    // One that waited in vain for this rank has said before that it was ready, and is no more.
    const bool isOut = hasParted(order, epoch, rank) || isElsewhere(order, epoch, rank);
    if (rank != order.rank && isOut) lose(order, epoch, rank);
    const Place place = placeOf(entry, rank);
    entry.places.firstRows[rank] = place.firstRow;
    entry.places.numKeptFrom[rank] = place.numKept;
  }
}

/// Sets bytes to a word that repeats one of them. Called by all threads of the grid.
__device__ void fill(std::byte* out, std::int64_t bytes, unsigned word) {
  if ((reinterpret_cast<std::uintptr_t>(out) | static_cast<std::uintptr_t>(bytes)) % 16 == 0) {
    for (std::int64_t at = threadOfGrid(); at < bytes / 16; at += threadsOfGrid()) {
      reinterpret_cast<uint4*>(out)[at] = make_uint4(word, word, word, word);
    }
    return;
  }
  for (std::int64_t at = threadOfGrid(); at < bytes; at += threadsOfGrid()) {
    out[at] = static_cast<std::byte>(word);
  }
}

__global__ void __launch_bounds__(kThreads)
    blankKernel(const __grid_constant__ BlankArguments blank) {
  // What failed is marked by others.
  if (currentEpoch(blank.order) == 0) return;
  for (int rank = 0; rank < blank.order.numRanks; ++rank) {
    if (!isLost(blank.order, rank)) continue;
    const std::int64_t first = blank.firstRowFrom[rank];
    const std::int64_t count = blank.numKeptFrom[rank];
    for (int column = 0; column < kNumColumns; ++column) {
      if (blank.columns[column] == nullptr) continue;
      const std::int64_t rowBytes = blank.rowBytes[column];
      const bool isIndex = column == kTopkIdx || column == kSourceIndex;
      fill(blank.columns[column] + first * rowBytes, count * rowBytes, isIndex ? ~0U : 0U);
    }
  }
}

/// Whether a rank has been lost that was there when the operation was entered. For the whole block.
__device__ bool hasLostSince(const SumContext& context) {
  bool lost = false;
  for (int rank = threadIdx.x; rank < context.order.numRanks; rank += blockDim.x) {
    lost = lost || (isLost(context.order, rank) && context.firstRows[rank] != kNoPlace);
  }
  return __syncthreads_or(lost) != 0;
}

/// One element of the sum of a token.
template <class Element, bool kWeights>
__device__ void sumElement(const SumContext& context, std::int64_t token, std::int64_t element) {
  const Summands& summands = kWeights ? context.weights : context.rows;
  using One = Words<Element::kBytes, false>;
  const std::int64_t offset = element * Element::kBytes;
  VectorSum<Element, One> sum;
  sum.fill(kWeights ? 0.0F : context.start);
  for (int index = 0; index < summands.count(); ++index) {
    const Summand summand =
        locate<true, kWeights>(context, token, index, loadOrdinal(summands, token, index));
    if (summand.row == nullptr) continue;
    if (summand.rank >= 0 && isLost(context.order, summand.rank)) continue;
    One value;
    value.load(summand.row + offset);
    sum.add(value);
  }
  sum.store((kWeights ? context.outWeights : context.out) + token * summands.rowBytes + offset);
}

template <class Element, bool kWeights>
__device__ void sumElements(const SumContext& context, std::int64_t numTokens, std::int64_t width) {
  for (std::int64_t at = threadOfGrid(); at < numTokens * width; at += threadsOfGrid()) {
    const std::int64_t token = at / width;
    sumElement<Element, kWeights>(context, token, at - token * width);
  }
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    sumAgainKernel(const __grid_constant__ SumContext context, std::int64_t numTokens,
                   std::int64_t hidden) {
  if (currentEpoch(context.order) == 0 || !hasLostSince(context)) return;
  sumElements<Element, false>(context, numTokens, hidden);
  if (context.outWeights == nullptr) return;
  sumElements<Float32Element, true>(context, numTokens, context.topk);
}

template <class Element>
void launchSumAgain(const PushSumArguments& arguments, int numSms, cudaStream_t stream) {
  SumContext context = describeSum(arguments.sum);
  context.landing = {arguments.flags, static_cast<std::int32_t>(arguments.chunkRows)};
  EP_LIST_KERNEL(sumAgainKernel<Element>);
  sumAgainKernel<Element><<<blocksFor(numSms), kThreads, 0, stream>>>(
      context, arguments.sum.numTokens, arguments.sum.hidden);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that sums rows again");
}

__global__ void setLostKernel(const __grid_constant__ Order order, int rank, bool lost) {
  order.shrinking->lost[rank] = lost ? 1 : 0;
  const std::uint64_t epoch = currentEpoch(order);
  if (lost && epoch != 0) raise(order, epoch, Word::parted, rank, 1);
}

}  // namespace

void enterOperation(const EntryArguments& arguments, cudaStream_t stream) {
  EP_LIST_KERNEL(enterKernel);
  enterKernel<<<1, kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that enters an operation");
}

void blankLostRows(const BlankArguments& arguments, int numSms, cudaStream_t stream) {
  EP_LIST_KERNEL(blankKernel);
  blankKernel<<<blocksFor(numSms), kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that blanks rows");
}

void sumWithoutLost(const PushSumArguments& arguments, int numSms, cudaStream_t stream) {
  withElement(arguments.sum.dtype,
              [&]<class Element>(Element) { launchSumAgain<Element>(arguments, numSms, stream); });
}

void setLost(const Order& order, int rank, bool lost, cudaStream_t stream) {
  EP_LIST_KERNEL(setLostKernel);
  setLostKernel<<<1, 1, 0, stream>>>(order, rank, lost);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that parts with a rank");
}

}  // namespace mscclpp_ep::cuda
