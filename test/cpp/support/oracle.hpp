// SPDX-License-Identifier: MIT
// What dispatch and combine are defined to give, computed in the plainest way from the inputs of
// all ranks, which are drawn from a seed. Shares no code with the library.
#ifndef MSCCLPP_EP_TEST_SUPPORT_ORACLE_HPP_
#define MSCCLPP_EP_TEST_SUPPORT_ORACLE_HPP_

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep::testing {

using Bytes = std::vector<std::byte>;

/// One dispatch and the combines of it; the same on every rank.
struct Scenario {
  unsigned seed = 0;
  int ranks = 1;
  std::vector<std::int64_t> tokens;  ///< [R]
  std::int64_t experts = 4;
  std::vector<std::int32_t> expertMap;
  std::int64_t hidden = 8;
  DataType dtype = DataType::bfloat16;
  std::int64_t topk = 2;  ///< 0: without top-k
  bool wideIds = true;
  unsigned percentNone = 10;  ///< of the choices
  std::int64_t numScales = 0;
  DataType scaleDtype = DataType::float32;
  bool columnScales = false;  ///< stored column by column
  std::int64_t alignment = 1;
  std::int64_t worstTokens = 0;
  DataType combineDtype = DataType::bfloat16;
  int biases = 0;
};

/// What a rank dispatches. Scales are in C order here, however they are stored.
struct RankData {
  std::int64_t tokens = 0;
  Bytes x;
  Bytes scales;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
  std::vector<std::uint8_t> inRank;
  std::vector<std::int32_t> perRank;
  std::vector<std::int32_t> perExpert;
};

struct Place {
  int rank = 0;
  std::int64_t local = 0;
};

inline Place placeOf(const Scenario& s, std::int64_t expert) {
  const auto rankOf = [&s](std::int64_t e) {
    if (!s.expertMap.empty()) return static_cast<int>(s.expertMap[static_cast<std::size_t>(e)]);
    int rank = 0;
    while ((rank + 1) * ((s.experts + s.ranks - 1) / s.ranks) <= e) ++rank;
    return rank;
  };
  Place place{rankOf(expert), 0};
  for (std::int64_t e = 0; e < expert; ++e) place.local += rankOf(e) == place.rank ? 1 : 0;
  return place;
}

inline Bytes randomBytes(std::mt19937& random, std::size_t count) {
  Bytes bytes(count);
  for (std::size_t i = 0; i < count; i += sizeof(std::uint32_t)) {
    const auto word = static_cast<std::uint32_t>(random());
    std::memcpy(bytes.data() + i, &word, std::min(sizeof(word), count - i));
  }
  return bytes;
}

/// Draws choices, or without top-k the ranks at once, and counts them.
inline void drawRouting(const Scenario& s, std::mt19937& random, RankData& data) {
  data.inRank.resize(static_cast<std::size_t>(data.tokens * s.ranks));
  data.perRank.resize(static_cast<std::size_t>(s.ranks));
  data.perExpert.resize(static_cast<std::size_t>(s.experts));
  if (s.topk == 0) {
    for (std::uint8_t& flag : data.inRank) flag = random() % 2;
    for (std::int32_t& count : data.perExpert) count = static_cast<std::int32_t>(random() % 50);
  }
  for (std::int64_t i = 0; i < data.tokens * s.topk; ++i) {
    const bool none = random() % 100 < s.percentNone;
    const std::int64_t id = none ? -1 : static_cast<std::int64_t>(random()) % s.experts;
    data.ids.push_back(id);
    data.weights.push_back(static_cast<float>(random() % 1000) / 256.0F);
    if (none) continue;
    ++data.perExpert[static_cast<std::size_t>(id)];
    data.inRank[static_cast<std::size_t>(i / s.topk * s.ranks + placeOf(s, id).rank)] = 1;
  }
  for (std::size_t i = 0; i < data.inRank.size(); ++i) {
    data.perRank[i % static_cast<std::size_t>(s.ranks)] += data.inRank[i];
  }
}

/// `repeat` is the number of the dispatch with the same routing, from 0.
inline RankData dataOf(const Scenario& s, int rank, unsigned repeat = 0) {
  RankData data;
  data.tokens = s.tokens[static_cast<std::size_t>(rank)];
  std::seed_seq forRouting{s.seed, static_cast<unsigned>(rank)};
  std::mt19937 random(forRouting);
  drawRouting(s, random, data);
  std::seed_seq forRows{s.seed, static_cast<unsigned>(rank), repeat + 1};
  random.seed(forRows);
  data.x =
      randomBytes(random, static_cast<std::size_t>(data.tokens * s.hidden) * itemSize(s.dtype));
  data.scales = randomBytes(
      random, static_cast<std::size_t>(data.tokens * s.numScales) * itemSize(s.scaleDtype));
  return data;
}

/// A row that a rank receives, if there is room for it.
struct Row {
  int source = 0;
  std::int64_t token = 0;
};

inline std::vector<Row> rowsOf(const Scenario& s, const std::vector<RankData>& all, int receiver) {
  std::vector<Row> rows;
  for (int source = 0; source < s.ranks; ++source) {
    const RankData& data = all[static_cast<std::size_t>(source)];
    for (std::int64_t token = 0; token < data.tokens; ++token) {
      if (data.inRank[static_cast<std::size_t>(token * s.ranks + receiver)] != 0) {
        rows.push_back({source, token});
      }
    }
  }
  return rows;
}

inline std::vector<Row> keptRowsOf(const Scenario& s, const std::vector<RankData>& all,
                                   int receiver) {
  std::vector<Row> rows = rowsOf(s, all, receiver);
  const auto most = static_cast<std::size_t>(s.worstTokens);
  if (most > 0 && rows.size() > most) rows.resize(most);
  return rows;
}

/// What a dispatch leaves on a rank.
struct Received {
  std::vector<Row> rows;  ///< those that were kept
  std::int64_t numRecv = 0;
  std::int64_t numRows = 0;  ///< of the outputs
  Bytes x;
  Bytes scales;
  std::vector<std::int64_t> ids;  ///< [numRows, K], -1 and 0 in rows not received
  std::vector<float> weights;
  std::vector<std::int32_t> sourceIndex;
  std::vector<std::int64_t> perExpert;
  std::vector<std::int32_t> rankPrefixSum;
};

inline void appendRow(const Bytes& from, std::int64_t row, std::int64_t rowBytes, Bytes& to) {
  to.insert(to.end(), from.begin() + row * rowBytes, from.begin() + (row + 1) * rowBytes);
}

inline void countReceived(const Scenario& s, const std::vector<RankData>& all, int rank,
                          Received& received) {
  for (std::int64_t e = 0; e < s.experts; ++e) {
    if (placeOf(s, e).rank != rank) continue;
    std::int64_t count = 0;
    for (const RankData& data : all) count += data.perExpert[static_cast<std::size_t>(e)];
    received.perExpert.push_back(count);
  }
  std::int32_t sum = 0;
  for (const RankData& data : all) {
    sum += data.perRank[static_cast<std::size_t>(rank)];
    received.rankPrefixSum.push_back(sum);
  }
}

inline Received receivedBy(const Scenario& s, const std::vector<RankData>& all, int rank) {
  Received received;
  received.rows = keptRowsOf(s, all, rank);
  received.numRecv = static_cast<std::int64_t>(rowsOf(s, all, rank).size());
  received.numRows = s.worstTokens > 0 ? s.worstTokens : received.numRecv;
  const auto room = static_cast<std::size_t>(received.numRows * s.topk);
  received.ids.assign(room, -1);
  received.weights.assign(room, 0.0F);
  received.sourceIndex.assign(static_cast<std::size_t>(received.numRows), -1);
  for (std::size_t row = 0; row < received.rows.size(); ++row) {
    const auto& [source, token] = received.rows[row];
    const RankData& data = all[static_cast<std::size_t>(source)];
    appendRow(data.x, token, s.hidden * static_cast<std::int64_t>(itemSize(s.dtype)), received.x);
    appendRow(data.scales, token, s.numScales * static_cast<std::int64_t>(itemSize(s.scaleDtype)),
              received.scales);
    received.sourceIndex[row] = static_cast<std::int32_t>(token);
    const auto topk = static_cast<std::size_t>(s.topk);
    for (std::size_t k = 0; k < topk; ++k) {
      const std::size_t from = static_cast<std::size_t>(token) * topk + k;
      if (data.ids[from] < 0 || placeOf(s, data.ids[from]).rank != rank) continue;
      received.ids[row * topk + k] = placeOf(s, data.ids[from]).local;
      received.weights[row * topk + k] = data.weights[from];
    }
  }
  countReceived(s, all, rank, received);
  return received;
}

// The formats of floating point, for finite values that are not too large.

inline int mantissaBits(DataType dtype) { return dtype == DataType::bfloat16 ? 7 : 10; }
inline int exponentBias(DataType dtype) { return dtype == DataType::bfloat16 ? 127 : 15; }

/// The bits of the nearest value, of two the even one.
inline std::uint32_t encodeFloat(DataType dtype, float value) {
  if (dtype == DataType::float32) return std::bit_cast<std::uint32_t>(value);
  const int bias = exponentBias(dtype);
  const double magnitude = std::fabs(static_cast<double>(value));
  const int exponent = std::max(magnitude == 0 ? 1 - bias : std::ilogb(magnitude), 1 - bias);
  const double units = std::nearbyint(std::ldexp(magnitude, mantissaBits(dtype) - exponent));
  const int bits = ((exponent + bias - 1) << mantissaBits(dtype)) + static_cast<int>(units);
  return static_cast<std::uint32_t>(bits) | (std::signbit(value) ? 0x8000u : 0u);
}

inline float decodeFloat(DataType dtype, std::uint32_t bits) {
  if (dtype == DataType::float32) return std::bit_cast<float>(bits);
  const int width = mantissaBits(dtype);
  const int exponent = static_cast<int>((bits & 0x7FFFu) >> width);
  const int mantissa = static_cast<int>(bits & ((1u << width) - 1u));
  const int whole = exponent == 0 ? mantissa : mantissa + (1 << width);
  const float value =
      std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - exponentBias(dtype) - width);
  return (bits & 0x8000u) != 0 ? -value : value;
}

inline void store(DataType dtype, float value, std::byte* at) {
  const std::uint32_t bits = encodeFloat(dtype, value);
  std::memcpy(at, &bits, itemSize(dtype));
}

/// Values of many magnitudes, so that sums round; `name` tells apart what they are of.
inline float someValue(unsigned name, std::int64_t row, std::int64_t column) {
  auto mixed = static_cast<std::uint32_t>(name * 2654435761u + static_cast<unsigned>(row) * 40503u +
                                          static_cast<unsigned>(column) * 69621u + 17u);
  mixed = (mixed ^ (mixed >> 15)) * 2246822519u;
  mixed ^= mixed >> 13;
  const auto mantissa = static_cast<float>(static_cast<int>(mixed % 4001u) - 2000);
  return std::ldexp(mantissa, -static_cast<int>(mixed >> 28));
}

/// What the experts of `rank` make of a token of `source`, as one value of each column.
inline float expertValue(int rank, int source, std::int64_t token, std::int64_t column) {
  return someValue(static_cast<unsigned>(100 + rank * 16 + source), token, column);
}
inline float biasValue(int which, int rank, std::int64_t token, std::int64_t column) {
  return someValue(static_cast<unsigned>(which * 50 + rank), token, column);
}

struct Combined {
  Bytes x;
  std::vector<float> weights;
};

/// What a combine leaves on a rank, if every rank combines its experts' values and the weights that
/// it received.
inline Combined combinedAt(const Scenario& s, const std::vector<RankData>& all, int rank) {
  const std::int64_t tokens = all[static_cast<std::size_t>(rank)].tokens;
  const DataType dtype = s.combineDtype;
  std::vector<float> sums(static_cast<std::size_t>(tokens * s.hidden));
  Combined combined{Bytes(sums.size() * itemSize(dtype)),
                    std::vector<float>(static_cast<std::size_t>(tokens * s.topk))};
  const auto addRow = [&](std::int64_t token, const auto& value) {
    for (std::int64_t column = 0; column < s.hidden; ++column) {
      const std::uint32_t stored = encodeFloat(dtype, value(column));
      sums[static_cast<std::size_t>(token * s.hidden + column)] += decodeFloat(dtype, stored);
    }
  };
  for (int which = 0; which < s.biases; ++which) {
    for (std::int64_t token = 0; token < tokens; ++token) {
      addRow(token, [&](std::int64_t column) { return biasValue(which, rank, token, column); });
    }
  }
  for (int expertRank = 0; expertRank < s.ranks; ++expertRank) {
    const Received there = receivedBy(s, all, expertRank);
    for (std::size_t row = 0; row < there.rows.size(); ++row) {
      const auto& [source, token] = there.rows[row];
      if (source != rank) continue;
      const std::int64_t at = token;
      addRow(at, [&](std::int64_t column) { return expertValue(expertRank, rank, at, column); });
      const auto topk = static_cast<std::size_t>(s.topk);
      for (std::size_t k = 0; k < topk; ++k) {
        combined.weights[static_cast<std::size_t>(at) * topk + k] += there.weights[row * topk + k];
      }
    }
  }
  for (std::size_t i = 0; i < sums.size(); ++i) {
    store(dtype, sums[i], combined.x.data() + i * itemSize(dtype));
  }
  return combined;
}

}  // namespace mscclpp_ep::testing

#endif  // MSCCLPP_EP_TEST_SUPPORT_ORACLE_HPP_
