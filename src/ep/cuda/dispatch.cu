// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>

#include "cuda/device/copy.cuh"
#include "cuda/device/slices.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/kernels.hpp"
#include "transport/cuda_check.hpp"

namespace mscclpp_ep::cuda {

namespace {

struct PushContext {
  PushArguments push;
  Slices slices;
};

/// Up to a warp's width of ranks, of which each lane has one. All but `lanes` and `base` differ
/// between lanes.
struct Receivers {
  unsigned lanes = 0;  ///< whose ranks get the token
  int base = 0;        ///< rank of the first lane
  const PushTarget* target = nullptr;
  std::int64_t row = -1;  ///< of the token there; negative: it does not get it

  /// Where the token's element of a column is to go, null if nowhere.
  __device__ std::byte* element(Column column, std::int64_t bytes) const {
    if (row < 0 || target->columns[column] == nullptr) return nullptr;
    return target->columns[column] + row * bytes;
  }
};

__device__ Receivers findReceivers(const PushArguments& push, std::int64_t token, int base) {
  Receivers found;
  found.base = base;
  const int rank = base + laneIndex();
  if (rank < push.numRanks) {
    const std::int32_t ordinal = push.head[token * push.numRanks + rank];
    if (ordinal >= 0) {
      found.target = push.targets + rank;
      const std::int64_t row = found.target->firstRow + ordinal;
      if (row < found.target->capacity) found.row = row;
    }
  }
  found.lanes = __ballot_sync(kAllLanes, found.row >= 0);
  return found;
}

template <class Element>
__device__ void copyElement(std::byte* out, const std::byte* in) {
  *reinterpret_cast<Element*>(out) = *reinterpret_cast<const Element*>(in);
}

__device__ void copyScale(std::byte* out, const std::byte* in, std::int64_t bytes) {
  if (bytes == 4) return copyElement<std::uint32_t>(out, in);
  if (bytes == 2) return copyElement<std::uint16_t>(out, in);
  for (std::int64_t i = 0; i < bytes; ++i) out[i] = in[i];
}

__device__ void pushScales(const ScaleArray& scales, const Receivers& receivers,
                           std::int64_t token) {
  if (scales.data == nullptr) return;
  std::byte* mine = receivers.element(kScales, scales.perToken * scales.elementBytes);
  const std::byte* in = scales.data + token * scales.tokenStride;
  for (unsigned lanes = receivers.lanes; lanes != 0;) {
    std::byte* out = broadcast(mine, takeLowest(lanes));
    if (out == nullptr) continue;
    for (std::int64_t i = laneIndex(); i < scales.perToken; i += kWarpSize) {
      copyScale(out + i * scales.elementBytes, in + i * scales.elementStride, scales.elementBytes);
    }
  }
}

/// A choice of a token, and whose expert it is: nobody's is -1.
struct Choice {
  std::int32_t owner = -1;
  std::int32_t localIndex = -1;
  float weight = 0.0F;
};

template <class Index>
__device__ Choice loadChoice(const PushArguments& push, std::int64_t token, std::int64_t k) {
  Choice choice;
  if (k >= push.topk.topk) return choice;
  const std::int64_t at = token * push.topk.topk + k;
  const Index id = static_cast<const Index*>(push.topk.ids)[at];
  if (id < 0) return choice;
  choice.owner = push.placement.owner[id];
  choice.localIndex = push.placement.localIndex[id];
  if (push.topk.weights != nullptr) choice.weight = push.topk.weights[at];
  return choice;
}

/// A receiver gets the choices that are its own, by local id.
template <class Index>
__device__ void pushChoices(const PushArguments& push, const Receivers& receivers,
                            std::int64_t token) {
  const std::int64_t topk = push.topk.topk;
  std::byte* myIds = receivers.element(kTopkIdx, topk * static_cast<std::int64_t>(sizeof(Index)));
  std::byte* myWeights =
      receivers.element(kTopkWeights, topk * static_cast<std::int64_t>(sizeof(float)));
  for (std::int64_t first = 0; first < topk; first += kWarpSize) {
    const std::int64_t k = first + laneIndex();
    const Choice choice = loadChoice<Index>(push, token, k);
    for (unsigned lanes = receivers.lanes; lanes != 0;) {
      const int lane = takeLowest(lanes);
      auto* ids = reinterpret_cast<Index*>(broadcast(myIds, lane));
      auto* weights = reinterpret_cast<float*>(broadcast(myWeights, lane));
      const bool own = choice.owner == receivers.base + lane;
      if (k < topk && ids != nullptr) ids[k] = own ? choice.localIndex : -1;
      if (k < topk && weights != nullptr) weights[k] = own ? choice.weight : 0.0F;
    }
  }
}

__device__ void pushColumns(const PushArguments& push, const Receivers& receivers,
                            std::int64_t token) {
  pushScales(push.scales, receivers, token);
  if (push.topk.ids != nullptr) {
    push.topk.wide ? pushChoices<std::int64_t>(push, receivers, token)
                   : pushChoices<std::int32_t>(push, receivers, token);
  }
  std::byte* source = receivers.element(kSourceIndex, sizeof(std::int32_t));
  if (source != nullptr) {
    *reinterpret_cast<std::int32_t*>(source) = static_cast<std::int32_t>(token);
  }
}

template <class Vector>
__device__ void pushSlice(const PushArguments& push, const SliceCursor& slice) {
  const std::int64_t token = slice.token();
  const std::byte* in = push.rows + token * push.rowBytes;
  for (int base = 0; base < push.numRanks; base += kWarpSize) {
    const Receivers receivers = findReceivers(push, token, base);
    if (receivers.lanes == 0) continue;
    std::byte* mine = receivers.element(kRows, push.rowBytes);
    copyToMany<Vector>(in, mine, receivers.lanes, slice.begin(), slice.end());
    if (slice.isFirstPart()) pushColumns(push, receivers, token);
  }
}

template <class Vector>
__global__ void __launch_bounds__(kBlockThreads, 1)
    pushKernel(const __grid_constant__ PushContext context) {
  for (SliceCursor slice(context.slices); slice.valid(); slice.advance()) {
    pushSlice<Vector>(context.push, slice);
  }
  // What tells the receivers is a later store, maybe not of this kernel, to their memory.
  __threadfence_system();
}

template <class Vector>
void launchPush(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  const std::int64_t length = arguments.rowBytes / static_cast<std::int64_t>(sizeof(Vector));
  // Parts begin with a whole line of memory if rows do.
  const Slices slices = cutRows(arguments.numTokens, length, kCopyStep, kWarpSize, numSms);
  const LaunchShape shape = shapeFor(slices, numSms);
  pushKernel<Vector><<<shape.blocks, shape.threads, 0, stream>>>({arguments, slices});
  EP_CUDA_TRY(cudaGetLastError(), "cannot start the kernel that pushes rows");
}

}  // namespace

void pushRows(const PushArguments& arguments, int numSms, cudaStream_t stream) {
  if (arguments.numTokens == 0) return;
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
