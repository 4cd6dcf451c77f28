// SPDX-License-Identifier: MIT
// The integrity mode: rows of other ranks carry a checksum and a tag, which are compared where they
// are used. Kernels beside those that move rows, so that these are the same with the mode and
// without; the links and the caches between are what is checked, and memory that changes meanwhile.
#ifndef MSCCLPP_EP_CUDA_INTEGRITY_HPP_
#define MSCCLPP_EP_CUDA_INTEGRITY_HPP_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/packets.hpp"
#include "cuda/kernels.hpp"

namespace mscclpp_ep::cuda {

/// Writes checksums and tags of what pushRows() has sent with the same arguments, to the columns
/// for them. An operation of its own in the order of the ranks, behind that one.
void sealSentRows(const PushArguments& arguments, int numSms, cudaStream_t stream);

/// What a rank has received, each array from its first row.
struct ReceivedRows {
  const std::byte* rows = nullptr;
  std::int64_t rowBytes = 0;
  const std::byte* scales = nullptr;  ///< null: there are none, as below
  std::int64_t scalesPerRow = 0;
  std::int64_t scaleBytes = 0;  ///< of one
  const void* ids = nullptr;
  const float* weights = nullptr;
  std::int64_t topk = 0;
  bool wide = false;  ///< ids are int64
  const std::uint64_t* checksums = nullptr;
  const std::uint64_t* tags = nullptr;
  const std::int32_t* sourceTokens = nullptr;
  const std::int32_t* firstRowFrom = nullptr;  ///< [R]
  const std::int32_t* numKeptFrom = nullptr;   ///< [R]
  Order order;
};

/// Compares them with what sealSentRows() has written.
void verifyReceivedRows(const ReceivedRows& arguments, int numSms, cudaStream_t stream);

/// Rows that this rank gives to a combine.
struct ReturnedRows {
  const std::byte* rows = nullptr;
  std::int64_t rowBytes = 0;
  const float* weights = nullptr;  ///< null: there are none
  std::int64_t topk = 0;
  std::int64_t numRows = 0;
  const std::int32_t* sourceTokens = nullptr;
  RowSeal* seals = nullptr;  ///< [numRows]
  Order order;
};

/// Makes the seals of rows, for other ranks to read. Comes before the kernel that sums them.
void sealReturnedRows(const ReturnedRows& arguments, int numSms, cudaStream_t stream);

/// The rows that were summed, as sumRows() had them, or pushAndSumRows().
struct SummedRows {
  SumArguments sum;
  std::int64_t rowBytes = 0;
  bool landed = false;            ///< rows of other ranks are in landing areas
  PerRank<const RowSeal*> seals;  ///< of each other rank, from its first row
};

/// Compares the rows of other ranks with their seals. Comes behind the kernel that has summed them,
/// an operation of its own in the order of the ranks.
void verifySummedRows(const SummedRows& arguments, int numSms, cudaStream_t stream);

/// Behind either: if a row was damaged, ends the buffer on this rank, when the others no longer
/// wait for the operation, and tells the host. Results of a buffer that has ended are poisoned.
void concludeChecks(const Order& order, const Poison& results, cudaStream_t stream);

}  // namespace mscclpp_ep::cuda

#endif  // MSCCLPP_EP_CUDA_INTEGRITY_HPP_
