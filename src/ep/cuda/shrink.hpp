// SPDX-License-Identifier: MIT
// Kernels beside those that move rows, of buffers that go on without ranks: so that those are the
// same in all buffers. Which ranks an operation is without is decided when it is entered, for all
// of its blocks alike; a rank that is lost later is taken out of the results when all is done.
#ifndef MSCCLPP_EP_CUDA_SHRINK_HPP_
#define MSCCLPP_EP_CUDA_SHRINK_HPP_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/packets.hpp"
#include "cuda/combine_push.hpp"
#include "cuda/kernels.hpp"
#include "cuda/order.hpp"

namespace mscclpp_ep::cuda {

/// What a rank has of another one in an operation.
struct Place {
  std::int32_t firstRow = 0;  ///< at the other one, of this rank's tokens
  std::int32_t numKept = 0;   ///< rows here of the other one's tokens
};

/// Those of the operation that runs, in device memory; of a rank that is lost kNoPlace, and none.
struct Places {
  std::int32_t* firstRows = nullptr;    ///< [R]
  std::int32_t* numKeptFrom = nullptr;  ///< [R]
};

struct EntryArguments {
  PerRank<Place> known;
  const std::int32_t* firstRows = nullptr;    ///< [R] in place of those that are known; or null
  const std::int32_t* numKeptFrom = nullptr;  ///< [R] likewise
  Places places;
  Order order;
};

/// Waits until the peers have begun the operation, or are lost, and says where rows go. Comes
/// before the kernel that moves them, as part of the same operation.
void enterOperation(const EntryArguments& arguments, cudaStream_t stream);

struct BlankArguments {
  std::byte* columns[kNumColumns] = {};  ///< null: there is no such array
  std::int64_t rowBytes[kNumColumns] = {};
  const std::int32_t* firstRowFrom = nullptr;  ///< [R]
  const std::int32_t* numKeptFrom = nullptr;   ///< [R]
  Order order;
};

/// Blanks the rows of a dispatch that came from ranks that are lost now, or should have: their
/// indices are -1, and all else 0. Comes when all rows are where the caller reads them.
void blankLostRows(const BlankArguments& arguments, int numSms, cudaStream_t stream);

/// Sums once more what pushAndSumRows() has summed with the same arguments, without the ranks that
/// were lost meanwhile; nothing if there are none. Its `firstRows` are Places::firstRows.
void sumWithoutLost(const PushSumArguments& arguments, int numSms, cudaStream_t stream);

/// Lets the kernels that follow go on without a rank, which is told, or with it again.
void setLost(const Order& order, int rank, bool lost, cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_SHRINK_HPP_
