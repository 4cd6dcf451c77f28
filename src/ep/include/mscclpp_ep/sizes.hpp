// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_SIZES_HPP_
#define MSCCLPP_EP_SIZES_HPP_

#include <cstdint>

#include "mscclpp_ep/export.hpp"

/// Pure functions for every size that a caller may need before there is a buffer.
namespace mscclpp_ep {

/// Experts of `rank`: contiguous blocks of ceil(E / R), the last ones short or empty.
MSCCLPP_EP_API std::int64_t numLocalExperts(std::int64_t numExperts, int numRanks, int rank);

/// Most rows that a rank can receive: one per token of any rank.
MSCCLPP_EP_API std::int64_t recvCapacity(std::int64_t maxTokensPerRank, int numRanks);

/// What a row of a dispatch is made of.
struct RowShape {
  std::int64_t rowBytes = 0;    ///< H times the size of an element
  std::int64_t scaleBytes = 0;  ///< bytes of a row's scales
  std::int64_t topk = 0;        ///< K, or 0 without top-k
  std::int64_t indexBytes = 8;  ///< size of an element of topk_idx
};

/// Arena bytes that one dispatch of `rows` received rows takes.
MSCCLPP_EP_API std::int64_t dispatchBytes(std::int64_t rows, const RowShape& shape);

/// Arena bytes with which `resultsAlive` results of `rows` rows are held and one more operation
/// still arrives in place: a value for `BufferOptions::maxArenaBytes`.
MSCCLPP_EP_API std::int64_t bufferBytes(std::int64_t rows, const RowShape& shape,
                                        std::int64_t resultsAlive);

/// Bytes of the memory in which a rank receives signals and counts.
MSCCLPP_EP_API std::int64_t controlBytes(int numRanks);

/// Tuned numbers of DeepEP's kernels. They size its rings; here they only reproduce its hints.
struct Config {
  std::int64_t numSms = 20;
  std::int64_t numMaxNvlChunkedSendTokens = 6;
  std::int64_t numMaxNvlChunkedRecvTokens = 256;
  std::int64_t numMaxRdmaChunkedSendTokens = 6;
  std::int64_t numMaxRdmaChunkedRecvTokens = 256;
};

/// Throws InvalidArgument unless the numbers fit together as DeepEP wants them; returns them with
/// the RDMA receive chunk rounded up to a multiple of the send chunk.
MSCCLPP_EP_API Config checked(Config config);

/// DeepEP's `Config.get_nvl_buffer_size_hint`, byte for byte.
MSCCLPP_EP_API std::int64_t nvlBufferSizeHint(const Config& config, std::int64_t hiddenBytes,
                                              int numRanks);
/// DeepEP's `Config.get_rdma_buffer_size_hint`, byte for byte.
MSCCLPP_EP_API std::int64_t rdmaBufferSizeHint(const Config& config, std::int64_t hiddenBytes,
                                               int numRanks);
/// DeepEP's `Buffer.get_low_latency_rdma_size_hint`, byte for byte.
MSCCLPP_EP_API std::int64_t lowLatencyRdmaSizeHint(std::int64_t numMaxDispatchTokensPerRank,
                                                   std::int64_t hidden, int numRanks,
                                                   std::int64_t numExperts);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_SIZES_HPP_
