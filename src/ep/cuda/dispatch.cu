// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>

#include "cuda/device/columns.cuh"
#include "cuda/device/copy.cuh"
#include "cuda/device/order.cuh"
#include "cuda/device/slices.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/dispatch_bulk.hpp"
#include "cuda/kernel_list.hpp"
#include "cuda/kernels.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

struct PushContext {
  PushArguments push;
  Slices slices;
};

/// Where a token's row goes at the rank of this lane; null if nowhere.
__device__ std::byte* findRow(const PushArguments& push, std::int64_t token, int rank) {
  if (rank >= push.numRanks) return nullptr;
  const Receiver receiver(push, rank);
  const std::int64_t row = receiver.rowOf(token);
  std::byte* rows = receiver.column(kRows);
  return row < 0 || rows == nullptr ? nullptr : rows + row * push.rowBytes;
}

template <class Vector>
__device__ void pushSlice(const PushArguments& push, const SliceCursor& slice) {
  const std::int64_t token = slice.token();
  const std::byte* in = push.rows + token * push.rowBytes;
  for (int base = 0; base < push.numRanks; base += kWarpSize) {
    std::byte* mine = findRow(push, token, base + laneIndex());
    const unsigned lanes = __ballot_sync(kAllLanes, mine != nullptr);
    if (lanes != 0) copyToMany<Vector>(in, mine, lanes, slice.begin(), slice.end());
  }
}

template <class Vector>
__global__ void __launch_bounds__(kBlockThreads, 1)
    pushKernel(const __grid_constant__ PushContext context) {
  if (blockIdx.x == 0) {
    bringCounts(context.push.hostCounts, static_cast<int>(threadIdx.x),
                static_cast<int>(blockDim.x));
  }
  bool fine = enterPeers(context.push.order);
  if (fine) {
    const int warps = static_cast<int>(gridDim.x * blockDim.x / kWarpSize);
    const int warp = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / kWarpSize);
    // From the last on, as where there are more warps than slices, those have none.
    pushColumns(context.push, warps - 1 - warp, warps, [](float) {});
    for (SliceCursor slice(context.slices); slice.valid(); slice.advance()) {
      pushSlice<Vector>(context.push, slice);
    }
    fine = leavePeers(context.push.order);
  }
  if (!fine) poison(context.push.poison);
}

template <class Vector>
void launchPush(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  const std::int64_t length = arguments.rowBytes / static_cast<std::int64_t>(sizeof(Vector));
  // Parts begin with a whole line of memory if rows do.
  const Slices slices = cutRows(arguments.numTokens, length, kCopyStep, kWarpSize, numSms);
  const LaunchShape shape = shapeFor(slices, numSms);
  EP_LIST_KERNEL(pushKernel<Vector>);
  pushKernel<Vector><<<shape.blocks, shape.threads, 0, stream>>>({arguments, slices});
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes rows");
}

}  // namespace

void pushRows(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  if (canPushInBulk(arguments)) return pushRowsInBulk(arguments, numSms, stream);
  switch (arguments.rowAlignment) {
    case 16:
      return launchPush<uint4>(arguments, numSms, stream);
    case 8:
      return launchPush<uint2>(arguments, numSms, stream);
    case 4:
      return launchPush<unsigned>(arguments, numSms, stream);
    case 2:
      return launchPush<unsigned short>(arguments, numSms, stream);
    default:
      return launchPush<unsigned char>(arguments, numSms, stream);
  }
}

}  // namespace mscclpp_ep::cuda
