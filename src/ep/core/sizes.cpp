// SPDX-License-Identifier: MIT
#include "mscclpp_ep/sizes.hpp"

#include <algorithm>
#include <initializer_list>

#include "core/check.hpp"

namespace mscclpp_ep {
namespace {

constexpr std::int64_t kDeepEpNvlRanks = 8;  // ranks of a node in DeepEP's formulas
constexpr std::int64_t kDeepEpAlignment = 128;
constexpr std::int64_t kIntBytes = 4;
constexpr std::int64_t kFloatBytes = 4;

// Beside its hidden bytes, what DeepEP's rings keep for a token: its source (8 bytes), and as many
// as 128 indices of 8 bytes, 128 weights and 128 scales.
constexpr std::int64_t kDeepEpTokenExtraBytes = 8 + 128 * 8 + 128 * kFloatBytes + 128 * kFloatBytes;
constexpr std::int64_t kDeepEpRdmaFlagBytes = 16;

[[noreturn]] void throwTooLarge() {
  throw InvalidArgument("a size does not fit in 63 bits: the arguments are too large together");
}

std::int64_t product(std::initializer_list<std::int64_t> factors) {
  std::int64_t result = 1;
  for (const std::int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) throwTooLarge();
  }
  return result;
}

std::int64_t sum(std::initializer_list<std::int64_t> terms) {
  std::int64_t result = 0;
  for (const std::int64_t term : terms) {
    if (__builtin_add_overflow(result, term, &result)) throwTooLarge();
  }
  return result;
}

std::int64_t ceilDiv(std::int64_t value, std::int64_t divisor) {
  return value / divisor + (value % divisor != 0 ? 1 : 0);
}

std::int64_t roundUp(std::int64_t value, std::int64_t multiple) {
  return product({ceilDiv(value, multiple), multiple});
}

void expectAtLeast(std::string_view what, std::int64_t value, std::int64_t least) {
  EP_EXPECTS(value >= least, what, " is ", value, "; it must be at least ", least);
}

// DeepEP refuses more than 8 ranks that are no multiple of 8. The last node may be short here.
std::int64_t numDeepEpNodes(int numRanks) { return ceilDiv(numRanks, kDeepEpNvlRanks); }

}  // namespace

std::int64_t numLocalExperts(std::int64_t numExperts, int numRanks, int rank) {
  expectAtLeast("the number of experts", numExperts, 1);
  expectAtLeast("the number of ranks", numRanks, 1);
  EP_EXPECTS(0 <= rank && rank < numRanks, "the rank is ", rank, "; it must be in [0, ", numRanks,
             ")");
  const std::int64_t block = ceilDiv(numExperts, numRanks);
  // Compared by division: rank * block may not fit.
  if (rank >= ceilDiv(numExperts, block)) return 0;
  return std::min(block, numExperts - rank * block);
}

std::int64_t recvCapacity(std::int64_t maxTokensPerRank, int numRanks) {
  expectAtLeast("the number of tokens of a rank", maxTokensPerRank, 0);
  expectAtLeast("the number of ranks", numRanks, 1);
  return product({maxTokensPerRank, numRanks});
}

Config checked(Config config) {
  const auto expectChunks = [](std::string_view kind, std::int64_t send, std::int64_t recv) {
    EP_EXPECTS(send > 0 && recv > 0, "a config has ", kind, " chunks of ", send, " sent and ", recv,
               " received tokens; both must be positive");
    EP_EXPECTS(send < recv, "a config has ", kind, " chunks of ", send, " sent and ", recv,
               " received tokens; fewer must be sent than received");
  };
  expectAtLeast("the number of SMs of a config", config.numSms, 0);
  expectChunks("NVLink", config.numMaxNvlChunkedSendTokens, config.numMaxNvlChunkedRecvTokens);
  const std::int64_t rdmaSend = config.numMaxRdmaChunkedSendTokens;
  std::int64_t& rdmaRecv = config.numMaxRdmaChunkedRecvTokens;
  if (rdmaSend > 0 && rdmaRecv > 0) rdmaRecv = roundUp(rdmaRecv, rdmaSend);
  // Once the one is a multiple of the other, this also means twice as many.
  expectChunks("RDMA", rdmaSend, rdmaRecv);
  return config;
}

std::int64_t nvlBufferSizeHint(const Config& config, std::int64_t hiddenBytes, int numRanks) {
  const Config c = checked(config);
  expectAtLeast("the number of hidden bytes", hiddenBytes, 0);
  expectAtLeast("the number of ranks", numRanks, 1);
  const std::int64_t rings =
      product({c.numSms / 2, std::min<std::int64_t>(numRanks, kDeepEpNvlRanks)});
  const std::int64_t counters = 2 * numDeepEpNodes(numRanks) + 3;
  const std::int64_t tokenBytes = sum({hiddenBytes, kDeepEpTokenExtraBytes});
  return roundUp(sum({product({rings, counters, kIntBytes}),
                      product({rings, c.numMaxNvlChunkedRecvTokens, tokenBytes})}),
                 kDeepEpAlignment);
}

std::int64_t rdmaBufferSizeHint(const Config& config, std::int64_t hiddenBytes, int numRanks) {
  const Config c = checked(config);
  expectAtLeast("the number of hidden bytes", hiddenBytes, 0);
  expectAtLeast("the number of ranks", numRanks, 1);
  if (numRanks <= kDeepEpNvlRanks) return 0;
  // A send and a receive ring.
  const std::int64_t rings = product({c.numSms / 2, numDeepEpNodes(numRanks), 2});
  const std::int64_t counters = 2 * kDeepEpNvlRanks + 2;
  const std::int64_t tokenBytes = sum({hiddenBytes, kDeepEpTokenExtraBytes, kDeepEpRdmaFlagBytes});
  return roundUp(sum({product({rings, counters, kIntBytes}),
                      product({rings, c.numMaxRdmaChunkedRecvTokens, tokenBytes})}),
                 kDeepEpAlignment);
}

std::int64_t lowLatencyRdmaSizeHint(std::int64_t numMaxDispatchTokensPerRank, std::int64_t hidden,
                                    int numRanks, std::int64_t numExperts) {
  expectAtLeast("num_max_dispatch_tokens_per_rank", numMaxDispatchTokensPerRank, 1);
  expectAtLeast("the hidden size", hidden, 1);
  expectAtLeast("the number of ranks", numRanks, 1);
  expectAtLeast("the number of experts", numExperts, 1);
  const std::int64_t scaleBytes = product({hidden / 128, kFloatBytes});
  const std::int64_t bf16Bytes = product({hidden, 2});
  const std::int64_t dispatchBytes = sum({16, std::max(bf16Bytes, sum({hidden, scaleBytes}))});
  const std::int64_t combineBytes = sum({scaleBytes, bf16Bytes});
  const std::int64_t tokens = numMaxDispatchTokensPerRank;
  const std::int64_t recvDispatch = product({numExperts, tokens, dispatchBytes});
  const std::int64_t combine = product({numExperts, tokens, combineBytes});
  const std::int64_t send = std::max(product({tokens, dispatchBytes}), combine);
  const std::int64_t recv = std::max(recvDispatch, combine);
  const std::int64_t signal = roundUp(product({numExperts, kIntBytes}), kDeepEpAlignment);
  const std::int64_t both = product({2, sum({send, recv, signal})});
  // DeepEP adds a whole unit also where there is nothing to round up.
  return product({sum({both, kDeepEpAlignment}) / kDeepEpAlignment, kDeepEpAlignment});
}

}  // namespace mscclpp_ep
