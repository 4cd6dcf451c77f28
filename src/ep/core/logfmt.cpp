// SPDX-License-Identifier: MIT
#include "core/logfmt.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "core/numeric.hpp"

namespace mscclpp_ep {

namespace {

constexpr std::size_t kGroup = 128;
constexpr std::size_t kPack = 16;       // elements that are packed together
constexpr std::size_t kPackBytes = 20;  // 16 codes of 9 bits, then 16 signs
constexpr int kCodeBits = 9;
constexpr int kLargestCode = (1 << kCodeBits) - 1;
constexpr float kSteps = 510.0F;
constexpr float kMostOctaves = 32.0F;

std::size_t chunkSize(std::size_t hidden) { return hidden % 1024 == 0 ? 1024 : 512; }

std::size_t numGroups(std::size_t hidden) { return (hidden + kGroup - 1) / kGroup; }

/// The magnitudes between which a group's codes lie; sent in front of the row.
struct Range {
  std::uint16_t largest = 0;
  std::uint16_t least = 0;
};

/// The scale of a group's codes.
struct Scale {
  explicit Scale(const Range& range)
      : high(std::log2(floatFromBfloat16(range.largest))),
        low(std::max(std::log2(floatFromBfloat16(range.least)), high - kMostOctaves)),
        step((high - low) / kSteps) {}

  /// False also where one of them is no number.
  bool usable() const { return high < 0 && low < high; }

  float high;
  float low;
  float step;
};

Range rangeOf(std::span<const std::uint16_t> group) {
  Range range{0, 0x7FFF};
  for (const std::uint16_t element : group) {
    const auto magnitude = static_cast<std::uint16_t>(element & 0x7FFFu);
    range.largest = std::max(range.largest, magnitude);
    range.least = std::min(range.least, magnitude);
  }
  return range;
}

/// Codes of a group: rounded to the nearest in value, not in logarithm.
class Coder {
 public:
  explicit Coder(const Scale& scale)
      : scale_(scale),
        offset_(2.0F - std::log2((1.0F + std::exp2(scale.step)) / 2.0F) / scale.step -
                scale.low / scale.step) {}

  std::uint32_t encode(std::uint16_t element) const {
    const float magnitude = floatFromBfloat16(element & 0x7FFFu);
    if (magnitude == 0) return 0;
    const float code = std::log2(magnitude) / scale_.step + offset_;
    return static_cast<std::uint32_t>(std::clamp(code, 0.0F, static_cast<float>(kLargestCode)));
  }

  std::uint16_t decode(std::uint32_t code) const {
    if (code == 0) return 0;
    return bfloat16FromFloat(std::exp2(static_cast<float>(code - 1) * scale_.step + scale_.low));
  }

 private:
  Scale scale_;
  float offset_;
};

using Pack = std::array<std::uint32_t, kPackBytes / sizeof(std::uint32_t)>;

void putCode(Pack& pack, std::size_t i, std::uint32_t code) {
  const std::size_t bit = i * kCodeBits;
  pack[bit / 32] |= code << bit % 32;
  if (bit % 32 + kCodeBits > 32) pack[bit / 32 + 1] |= code >> (32 - bit % 32);
}

std::uint32_t getCode(const Pack& pack, std::size_t i) {
  const std::size_t bit = i * kCodeBits;
  std::uint32_t code = pack[bit / 32] >> bit % 32;
  if (bit % 32 + kCodeBits > 32) code |= pack[bit / 32 + 1] << (32 - bit % 32);
  return code & kLargestCode;
}

/// Whether all groups of a chunk can be encoded.
bool isEncoded(std::span<const Range> ranges) {
  return std::all_of(ranges.begin(), ranges.end(),
                     [](const Range& range) { return Scale(range).usable(); });
}

void encodePack(std::span<const std::uint16_t> elements, const Coder& coder, std::byte* out) {
  Pack pack{};
  for (std::size_t i = 0; i < elements.size(); ++i) {
    putCode(pack, i, coder.encode(elements[i]));
    pack.back() |= static_cast<std::uint32_t>(elements[i] >> 15) << (16 + i);
  }
  std::memcpy(out, pack.data(), kPackBytes);
}

void decodePack(const std::byte* in, const Coder& coder, std::span<std::uint16_t> elements) {
  Pack pack;
  std::memcpy(pack.data(), in, kPackBytes);
  for (std::size_t i = 0; i < elements.size(); ++i) {
    const auto sign = static_cast<std::uint16_t>((pack.back() >> (16 + i) & 1u) << 15);
    elements[i] = static_cast<std::uint16_t>(coder.decode(getCode(pack, i)) | sign);
  }
}

/// Calls work(pack's first element, its elements, the group's coder) for each pack of a chunk.
template <typename Work>
void forEachPack(std::size_t count, std::span<const Range> ranges, const Work& work) {
  for (std::size_t group = 0; group < ranges.size(); ++group) {
    const Coder coder{Scale(ranges[group])};
    const std::size_t end = std::min(count, (group + 1) * kGroup);
    for (std::size_t at = group * kGroup; at < end; at += kPack) {
      work(at, std::min(kPack, end - at), coder);
    }
  }
}

}  // namespace

std::size_t logfmtRowBytes(std::size_t hidden) {
  // A short row may be longer encoded than as it is: a pack has 20 bytes.
  return numGroups(hidden) * sizeof(Range) + hidden * sizeof(std::uint16_t) + kPackBytes;
}

std::size_t encodeLogfmt(std::span<const std::uint16_t> row, std::byte* out) {
  std::array<Range, 8> ranges;
  std::byte* header = out;
  std::byte* body = out + numGroups(row.size()) * sizeof(Range);
  const std::size_t size = chunkSize(row.size());
  for (std::size_t begin = 0; begin < row.size(); begin += size) {
    const auto chunk = row.subspan(begin, std::min(size, row.size() - begin));
    const std::span own(ranges.data(), numGroups(chunk.size()));
    for (std::size_t g = 0; g < own.size(); ++g) {
      own[g] = rangeOf(chunk.subspan(g * kGroup, std::min(kGroup, chunk.size() - g * kGroup)));
    }
    std::memcpy(header, own.data(), own.size_bytes());
    header += own.size_bytes();
    if (!isEncoded(own)) {
      std::memcpy(body, chunk.data(), chunk.size_bytes());
      body += chunk.size_bytes();
      continue;
    }
    forEachPack(chunk.size(), own, [&](std::size_t at, std::size_t count, const Coder& coder) {
      encodePack(chunk.subspan(at, count), coder, body);
      body += kPackBytes;
    });
  }
  return static_cast<std::size_t>(body - out);
}

void decodeLogfmt(const std::byte* in, std::span<std::uint16_t> row) {
  std::array<Range, 8> ranges;
  const std::byte* header = in;
  const std::byte* body = in + numGroups(row.size()) * sizeof(Range);
  const std::size_t size = chunkSize(row.size());
  for (std::size_t begin = 0; begin < row.size(); begin += size) {
    const auto chunk = row.subspan(begin, std::min(size, row.size() - begin));
    const std::span own(ranges.data(), numGroups(chunk.size()));
    std::memcpy(own.data(), header, own.size_bytes());
    header += own.size_bytes();
    if (!isEncoded(own)) {
      std::memcpy(chunk.data(), body, chunk.size_bytes());
      body += chunk.size_bytes();
      continue;
    }
    forEachPack(chunk.size(), own, [&](std::size_t at, std::size_t count, const Coder& coder) {
      decodePack(body, coder, chunk.subspan(at, count));
      body += kPackBytes;
    });
  }
}

}  // namespace mscclpp_ep
