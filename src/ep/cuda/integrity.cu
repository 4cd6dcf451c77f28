// SPDX-License-Identifier: MIT
#include <algorithm>

#include "cuda/device/columns.cuh"
#include "cuda/device/order.cuh"
#include "cuda/device/row_checksum.cuh"
#include "cuda/integrity.hpp"
#include "cuda/kernel_list.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

using Part = RowChecksum::Part;

constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarpSize;

__device__ std::int64_t warpOfGrid() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
}
__device__ std::int64_t warpsOfGrid() {
  return static_cast<std::int64_t>(gridDim.x) * kWarpsPerBlock;
}

/// The first damaged row is told of, by one lane. The operation goes on, as others wait for its
/// end.
__device__ void compare(const Order& order, const RowSeal& expected, const RowSeal& sent) {
  if (expected.checksum == sent.checksum && expected.tag == sent.tag) return;
  if (laneIndex() != 0 || atomicExch(order.damaged, 1U) != 0) return;
  order.failure->expected = expected;
  order.failure->sent = sent;
}

/// Ends the buffer on this rank if a row was damaged. Called by one thread.
__device__ void endDamaged(const Order& order, std::uint64_t epoch) {
  order.failure->peer = static_cast<std::uint32_t>(tagRank(order.failure->expected.tag));
  order.failure->word = static_cast<std::uint32_t>(Word::intact);
  *order.epoch = 0;
  storeRelease(&order.failure->epoch, epoch);
}

__global__ void __launch_bounds__(kThreads)
    concludeKernel(const __grid_constant__ Order order, const __grid_constant__ Poison results) {
  const std::uint64_t epoch = currentEpoch(order);
  const bool damaged = *order.damaged != 0;
  __syncthreads();
  if (damaged && epoch != 0 && threadIdx.x == 0) endDamaged(order, epoch);
  if (damaged || epoch == 0) poison(results);
}

// Dispatch.

/// An element of one, two or four bytes.
__device__ std::uint64_t loadElement(const std::byte* data, std::int64_t bytes) {
  switch (bytes) {
    case 4:
      return *reinterpret_cast<const std::uint32_t*>(data);
    case 2:
      return *reinterpret_cast<const std::uint16_t*>(data);
    default:
      return *reinterpret_cast<const std::uint8_t*>(data);
  }
}

__device__ void addChoice(RowChecksum& sum, std::int64_t k, std::int64_t id, float weight) {
  sum.add(Part::ids, k, static_cast<std::uint64_t>(id));
  sum.add(Part::weights, k, __float_as_uint(weight));
}

/// The checksum of what a token's row has at every receiver.
__device__ RowChecksum sumOfSent(const PushArguments& push, std::int64_t token) {
  RowChecksum sum;
  sum.addBytes(Part::row, push.rows + token * push.rowBytes, push.rowBytes);
  const ScaleArray& scales = push.scales;
  for (std::int64_t i = laneIndex(); scales.data != nullptr && i < scales.perToken;
       i += kWarpSize) {
    const std::byte* at = scales.data + token * scales.tokenStride + i * scales.elementStride;
    sum.add(Part::scales, i, loadElement(at, scales.elementBytes));
  }
  return sum;
}

template <class Index>
__device__ void addChoicesOf(const PushArguments& push, int rank, std::int64_t token,
                             RowChecksum& sum) {
  for (std::int64_t k = laneIndex(); k < push.topk.topk; k += kWarpSize) {
    const Choice choice = loadChoice<Index>(push, rank, token * push.topk.topk + k);
    addChoice(sum, k, choice.localIndex, choice.weight);
  }
}

__device__ void sealToken(const PushArguments& push, std::uint64_t epoch, std::int64_t token) {
  const RowChecksum common = sumOfSent(push, token);
  for (int rank = 0; rank < push.numRanks; ++rank) {
    const Receiver receiver(push, rank);
    const std::int64_t row = receiver.rowOf(token);
    if (row < 0) continue;
    RowChecksum sum = common;
    if (push.topk.ids != nullptr) {
      push.topk.wide ? addChoicesOf<std::int64_t>(push, rank, token, sum)
                     : addChoicesOf<std::int32_t>(push, rank, token, sum);
    }
    const std::uint64_t total = sum.total();
    if (laneIndex() != 0) continue;
    reinterpret_cast<std::uint64_t*>(receiver.column(kChecksum))[row] = total;
    reinterpret_cast<std::uint64_t*>(receiver.column(kSequenceTag))[row] =
        packTag(push.order.rank, token, epoch);
  }
}

__global__ void __launch_bounds__(kThreads)
    sealSentKernel(const __grid_constant__ PushArguments push) {
  const std::uint64_t epoch = currentEpoch(push.order);
  if (!enterPeers(push.order)) return;
  for (std::int64_t token = warpOfGrid(); token < push.numTokens; token += warpsOfGrid()) {
    sealToken(push, epoch, token);
  }
  leavePeers(push.order);
}

/// Whether a number is among the rows from a rank.
__device__ bool isFrom(const ReceivedRows& received, int rank, std::int64_t row) {
  const std::int64_t first = received.firstRowFrom[rank];
  return row >= first && row < first + received.numKeptFrom[rank];
}

__device__ RowChecksum sumOfReceived(const ReceivedRows& received, std::int64_t row) {
  RowChecksum sum;
  sum.addBytes(Part::row, received.rows + row * received.rowBytes, received.rowBytes);
  for (std::int64_t i = laneIndex(); received.scales != nullptr && i < received.scalesPerRow;
       i += kWarpSize) {
    const std::int64_t at = (row * received.scalesPerRow + i) * received.scaleBytes;
    sum.add(Part::scales, i, loadElement(received.scales + at, received.scaleBytes));
  }
  for (std::int64_t k = laneIndex(); received.ids != nullptr && k < received.topk; k += kWarpSize) {
    const std::int64_t at = row * received.topk + k;
    const std::int64_t id = received.wide ? static_cast<const std::int64_t*>(received.ids)[at]
                                          : static_cast<const std::int32_t*>(received.ids)[at];
    addChoice(sum, k, id, received.weights != nullptr ? received.weights[at] : 0.0F);
  }
  return sum;
}

/// The rows of all ranks come one behind the other.
__global__ void __launch_bounds__(kThreads)
    verifyReceivedKernel(const __grid_constant__ ReceivedRows received) {
  const std::uint64_t epoch = currentEpoch(received.order);
  if (epoch == 0) return;
  for (int rank = 0; rank < received.order.numRanks; ++rank) {
    if (isLost(received.order, rank)) continue;
    const std::int64_t first = received.firstRowFrom[rank];
    for (std::int64_t row = first + warpOfGrid(); isFrom(received, rank, row);
         row += warpsOfGrid()) {
      // A handle does not know the tokens of a rank that was lost when it was made.
      const std::int32_t known = received.sourceTokens[row];
      const std::int64_t token =
          known >= 0 ? known : static_cast<std::int64_t>(tagToken(received.tags[row]));
      const RowSeal expected{sumOfReceived(received, row).total(), packTag(rank, token, epoch - 1)};
      compare(received.order, expected, {received.checksums[row], received.tags[row]});
    }
  }
}

// Combine.

__device__ std::uint64_t checksumOf(const std::byte* row, std::int64_t rowBytes,
                                    const float* weights, std::int64_t topk) {
  RowChecksum sum;
  sum.addBytes(Part::row, row, rowBytes);
  for (std::int64_t k = laneIndex(); weights != nullptr && k < topk; k += kWarpSize) {
    sum.add(Part::weights, k, __float_as_uint(weights[k]));
  }
  return sum.total();
}

__global__ void __launch_bounds__(kThreads)
    sealReturnedKernel(const __grid_constant__ ReturnedRows returned) {
  const std::uint64_t epoch = currentEpoch(returned.order);
  for (std::int64_t row = warpOfGrid(); row < returned.numRows; row += warpsOfGrid()) {
    const float* weights =
        returned.weights != nullptr ? returned.weights + row * returned.topk : nullptr;
    const std::byte* at = returned.rows + row * returned.rowBytes;
    const std::uint64_t sum = checksumOf(at, returned.rowBytes, weights, returned.topk);
    if (laneIndex() == 0) {
      returned.seals[row] = {sum, packTag(returned.order.rank, returned.sourceTokens[row], epoch)};
    }
  }
}

__device__ void verifyToken(const SummedRows& summed, std::uint64_t epoch, std::int64_t token,
                            int rank) {
  const SumArguments& sum = summed.sum;
  const SumSource& source = sum.sources[rank];
  const std::int64_t ordinal = sum.head[token * sum.numRanks + rank];
  const std::int64_t first = sum.firstRows != nullptr ? sum.firstRows[rank] : source.span.firstRow;
  const std::int64_t row = first + ordinal;
  if (ordinal < 0 || row >= source.span.capacity) return;
  const std::int64_t place = summed.landed ? ordinal : row;
  const float* weights = sum.outWeights != nullptr ? source.weights + place * sum.topk : nullptr;
  const std::byte* at = source.rows + place * summed.rowBytes;
  const RowSeal expected{checksumOf(at, summed.rowBytes, weights, sum.topk),
                         packTag(rank, token, epoch - 1)};
  compare(sum.order, expected, summed.seals[rank][row]);
}

__global__ void __launch_bounds__(kThreads)
    verifySummedKernel(const __grid_constant__ SummedRows summed) {
  const Order& order = summed.sum.order;
  const std::uint64_t epoch = currentEpoch(order);
  if (!enterPeers(order)) return;
  for (std::int64_t token = warpOfGrid(); token < summed.sum.numTokens; token += warpsOfGrid()) {
    for (int rank = 0; rank < summed.sum.numRanks; ++rank) {
      if (rank != order.rank && !isLost(order, rank)) verifyToken(summed, epoch, token, rank);
    }
  }
  leavePeers(order);
}

unsigned blocksFor(int numSms) { return static_cast<unsigned>(std::max(numSms, 1)); }

}  // namespace

void sealSentRows(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  EP_LIST_KERNEL(sealSentKernel);
  sealSentKernel<<<blocksFor(numSms), kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that seals rows");
}

void verifyReceivedRows(const ReceivedRows& arguments, int numSms, cudaStream_t stream) {
  EP_LIST_KERNEL(verifyReceivedKernel);
  verifyReceivedKernel<<<blocksFor(numSms), kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that verifies rows");
}

void sealReturnedRows(const ReturnedRows& arguments, int numSms, cudaStream_t stream) {
  EP_LIST_KERNEL(sealReturnedKernel);
  sealReturnedKernel<<<blocksFor(numSms), kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that seals rows");
}

void verifySummedRows(const SummedRows& arguments, int numSms, cudaStream_t stream) {
  EP_LIST_KERNEL(verifySummedKernel);
  verifySummedKernel<<<blocksFor(numSms), kThreads, 0, stream>>>(arguments);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that verifies rows");
}

void concludeChecks(const Order& order, const Poison& results, cudaStream_t stream) {
  EP_LIST_KERNEL(concludeKernel);
  concludeKernel<<<1, kThreads, 0, stream>>>(order, results);
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that ends a buffer");
}

}  // namespace mscclpp_ep::cuda
