// SPDX-License-Identifier: MIT
#include <algorithm>
#include <bit>
#include <cstring>
#include <span>

#include "cpu/columns.hpp"
#include "cpu/integrity.hpp"
#include "cpu/low_latency.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cpu {

namespace {

constexpr std::int64_t kTokensPerPart = 8;
constexpr std::size_t kScalesPerLine = kCacheLine / sizeof(std::uint32_t);

/// What the rows of one rank look like in its staging, where they are sent from.
struct Format {
  explicit Format(const LowLatencyDispatchRequest& request)
      : numScales(
            request.options.quantization == Quantization::none
                ? 0
                : static_cast<std::size_t>(roundUp(request.signature.hidden, kGroup) / kGroup)),
        packed(request.options.quantization == Quantization::float8Ue8m0),
        elements(static_cast<std::size_t>(request.signature.hidden)),
        rowBytes(elements * (numScales > 0 ? 1 : itemSize(request.inputs.x.dtype))),
        scaleBytes(packed ? alignUp(numScales, sizeof(std::int32_t)) : numScales * sizeof(float)) {}

  static constexpr auto kGroup = static_cast<std::int64_t>(kGroupSize);

  std::size_t numScales;  ///< a row; 0: rows are sent as they are
  bool packed;            ///< scales are exponents, a byte each
  std::size_t elements;   ///< H
  std::size_t rowBytes;
  std::size_t scaleBytes;
};

/// The arrays of one rank's staging.
struct StagedTokens {
  std::int64_t numTokens = 0;
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;
  std::int32_t* topkIdx = nullptr;
  float* weights = nullptr;
  RowSeal* seals = nullptr;  ///< null unless the integrity mode is on

  RowSeal& sealOfRow(std::int64_t token) const { return seals[token]; }
  RowSeal& sealOfChoices(std::int64_t token) const { return seals[numTokens + token]; }
};

/// One dispatch, on one rank.
class DispatchReceive final : public LowLatencyReceive {
 public:
  DispatchReceive(LowLatencyLane& of, LowLatencyDispatchRequest request)
      : LowLatencyReceive(of),
        request_(std::move(request)),
        format_(request_),
        context_(of.context),
        topk_(request_.signature.topk),
        verifier_(context_, "low-latency dispatch") {
    bufferId = context_.bufferId;
    handle = std::make_shared<LowLatencyState>();
  }

  const char* name() const override { return "low-latency dispatch"; }
  void send();
  void receive() override;

 private:
  LowLatencyDispatchEntry reserve();
  const std::vector<Message>& collect();
  void stageTokens();
  void stageToken(std::int64_t token);
  void stageChoices();
  void beginHandle();
  StagedTokens locate(int rank, const LowLatencyDispatchEntry& entry) const;
  void place(const std::vector<StagedTokens>& sources);
  void requireIds(const std::vector<std::int32_t>& choices, int rank) const;
  void fetchRows(const std::vector<StagedTokens>& sources);
  void fetchRowsFrom(std::size_t rank, const StagedTokens& source);
  void fetchRow(std::int64_t slot, const StagedTokens& source, std::int64_t token);
  template <typename Work>
  void forEachRow(std::size_t rank, const StagedTokens& source, const Work& work) const;
  void fetchScales(const std::vector<StagedTokens>& sources);
  void listScales(std::int64_t expert, const std::vector<StagedTokens>& sources,
                  std::vector<const std::byte*>& rows) const;
  void writeScales(std::int64_t expert, const std::vector<const std::byte*>& rows);
  bool scalesFillLines(const std::uint32_t* words) const;
  void writeScaleLines(std::uint32_t* out, std::span<const std::byte* const> rows);
  void readScales(std::int64_t slot, std::byte* scales) const;
  void sealToken(std::int64_t token) const;
  std::uint64_t checksumOf(const std::int32_t* ids, const float* weights) const;
  void verifyChoices(int rank, const StagedTokens& source, const std::int32_t* ids,
                     const float* weights) const;
  void verifyRows(const std::vector<StagedTokens>& sources) const;
  void verifyRow(int rank, const StagedTokens& source, std::int64_t token, std::int64_t slot) const;

  std::int64_t slotsPerExpert() const { return request_.signature.maxTokens * context_.size(); }
  std::int64_t numTokens() const { return request_.inputs.x.shape[0]; }

  const LowLatencyDispatchRequest request_;
  const Format format_;
  Context& context_;
  const std::int64_t topk_;
  const RowVerifier verifier_;
  StagedTokens own_;
};

void DispatchReceive::send() {
  const LowLatencyDispatchEntry entry = reserve();
  stageTokens();
  beginHandle();
  const std::vector<Message> outgoing(static_cast<std::size_t>(context_.size()), encode(entry));
  lane.noteReaders();
  context_.mailbox.post(epoch, static_cast<std::uint32_t>(Round::entry), outgoing,
                        "room for a message");
}

/// Finds room for what is sent.
LowLatencyDispatchEntry DispatchReceive::reserve() {
  const auto tokens = static_cast<std::size_t>(numTokens());
  const auto choices = static_cast<std::size_t>(numTokens() * topk_);
  StagingPlan plan;
  const std::size_t rows = plan.add(tokens * format_.rowBytes);
  const std::size_t scales = plan.add(tokens * format_.scaleBytes);
  const std::size_t topkIdx = plan.add(choices * sizeof(std::int32_t));
  const std::size_t weights = plan.add(request_.inputs.topkWeights ? choices * sizeof(float) : 0);
  const std::size_t seals = plan.add(sealBytes(context_, 2 * numTokens()));
  lane.staging.reserve(std::max<std::size_t>(plan.bytes(), 1));

  std::byte* base = lane.staging.data();
  own_ = {numTokens(),
          base + rows,
          base + scales,
          reinterpret_cast<std::int32_t*>(base + topkIdx),
          request_.inputs.topkWeights ? reinterpret_cast<float*>(base + weights) : nullptr,
          context_.integrity ? reinterpret_cast<RowSeal*>(base + seals) : nullptr};
  LowLatencyDispatchEntry entry;
  entry.signature = request_.signature;
  entry.numTokens = numTokens();
  entry.rows = lane.staging.address(rows);
  entry.scales = lane.staging.address(scales);
  entry.topkIdx = lane.staging.address(topkIdx);
  entry.weights = lane.staging.address(weights);
  entry.seals = lane.staging.address(seals);
  return entry;
}

void DispatchReceive::stageTokens() {
  const TraceScope scope(context_.trace, "stage tokens");
  stageChoices();
  context_.workers.run(numTokens(), kTokensPerPart, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      stageToken(token);
      if (context_.integrity) sealToken(token);
    }
  });
}

void DispatchReceive::stageChoices() {
  const TensorView& topkIdx = request_.inputs.topkIdx;
  const auto count = static_cast<std::size_t>(numElements(topkIdx));
  if (topkIdx.dtype == DataType::int32) {
    std::copy_n(static_cast<const std::int32_t*>(topkIdx.data), count, own_.topkIdx);
  } else {
    const auto* wide = static_cast<const std::int64_t*>(topkIdx.data);
    std::transform(wide, wide + count, own_.topkIdx,
                   [](std::int64_t id) { return static_cast<std::int32_t>(id); });
  }
  if (own_.weights == nullptr) return;
  std::copy_n(static_cast<const float*>(request_.inputs.topkWeights.data), count, own_.weights);
}

/// Peers read the row soon, and more than once: it is left in the cache.
void DispatchReceive::stageToken(std::int64_t token) {
  const auto at = static_cast<std::size_t>(token);
  const std::size_t inputBytes = format_.elements * itemSize(request_.inputs.x.dtype);
  const auto* in = static_cast<const std::byte*>(request_.inputs.x.data) + at * inputBytes;
  std::byte* out = own_.rows + at * format_.rowBytes;
  if (format_.numScales == 0) return context_.kernels.copy(out, in, inputBytes);
  const bool powersOfTwo = request_.options.quantization != Quantization::float8;
  std::byte* scales = own_.scales + at * format_.scaleBytes;
  if (!format_.packed) {
    return context_.kernels.quantize(out, reinterpret_cast<float*>(scales), in, format_.elements,
                                     powersOfTwo);
  }
  std::vector<float> wide(format_.numScales);
  context_.kernels.quantize(out, wide.data(), in, format_.elements, powersOfTwo);
  std::memset(scales, 0, format_.scaleBytes);
  for (std::size_t i = 0; i < wide.size(); ++i) {
    scales[i] = static_cast<std::byte>(std::bit_cast<std::uint32_t>(wide[i]) >> 23);
  }
}

void DispatchReceive::beginHandle() {
  LowLatencyState& state = *handle;
  state.bufferId = context_.bufferId;
  state.epoch = epoch;
  state.maxTokens = request_.signature.maxTokens;
  state.hidden = request_.signature.hidden;
  state.topk = topk_;
  state.numTokens = numTokens();
  state.opaqueRows = isOpaque(request_.inputs.x.dtype);
  state.placement = request_.placement;
  state.topkIdx.assign(own_.topkIdx, own_.topkIdx + numTokens() * topk_);
  if (own_.weights == nullptr) return;
  state.hasWeights = true;
  state.ownWeights.assign(own_.weights, own_.weights + numTokens() * topk_);
}

void DispatchReceive::receive() {
  const auto& entries = collect();
  requireEntries(context_, entries);
  std::vector<StagedTokens> sources;
  for (int r = 0; r < context_.size(); ++r) {
    const Message& message = entries[static_cast<std::size_t>(r)];
    // A masked rank has no tokens.
    sources.push_back(message.empty() ? StagedTokens{}
                                      : locate(r, decode<LowLatencyDispatchEntry>(message)));
  }
  place(sources);
  fetchRows(sources);
  if (format_.numScales > 0) fetchScales(sources);
  if (context_.integrity) verifyRows(sources);
  verifier_.throwIfDamaged();
  handle->complete = true;
}

const std::vector<Message>& DispatchReceive::collect() {
  const TraceScope scope(context_.trace, "await tokens");
  const WaitClock clock(request_.outputs.waitStats);
  return context_.mailbox.collect(epoch, static_cast<std::uint32_t>(Round::entry), "the tokens",
                                  [&](int rank) { clock.add(rank); });
}

StagedTokens DispatchReceive::locate(int rank, const LowLatencyDispatchEntry& entry) const {
  if (rank == context_.rank()) return own_;
  if (entry.numTokens < 0 || entry.numTokens > request_.signature.maxTokens) {
    throw PeerFailure(cat("rank ", rank, " sent ", entry.numTokens, " tokens; at most ",
                          request_.signature.maxTokens, " can come"));
  }
  const auto at = [&](const ArrayAddress& address, std::size_t rowBytes, std::size_t alignment) {
    return peerRows(context_, rank, address, {0, entry.numTokens}, rowBytes, alignment);
  };
  const auto choices = static_cast<std::size_t>(topk_);
  StagedTokens tokens{entry.numTokens,
                      at(entry.rows, format_.rowBytes, 1),
                      at(entry.scales, format_.scaleBytes, 1),
                      reinterpret_cast<std::int32_t*>(at(entry.topkIdx, choices * 4, 4)),
                      nullptr,
                      nullptr};
  if (handle->hasWeights) {
    tokens.weights = reinterpret_cast<float*>(at(entry.weights, choices * 4, 4));
  }
  if (context_.integrity) {
    tokens.seals =
        reinterpret_cast<RowSeal*>(at(entry.seals, 2 * sizeof(RowSeal), alignof(RowSeal)));
  }
  return tokens;
}

/// Finds the slot of every row, and fills what tells the caller of them.
void DispatchReceive::place(const std::vector<StagedTokens>& sources) {
  const int self = context_.rank();
  const auto experts = static_cast<std::size_t>(request_.placement->numLocal(self));
  auto* ranges = static_cast<std::int64_t*>(request_.outputs.layoutRange.data);
  std::vector<std::int32_t> counts(experts);
  for (std::size_t r = 0; r < sources.size(); ++r) {
    const StagedTokens& source = sources[r];
    const std::vector<std::int32_t> before = counts;
    // A copy, as the peer's memory may change under our eyes if the peer is broken.
    const std::vector<std::int32_t> choices(source.topkIdx,
                                            source.topkIdx + source.numTokens * topk_);
    SourceRows rows;
    rows.numTokens = source.numTokens;
    if (source.weights != nullptr) {
      rows.weights.assign(source.weights, source.weights + source.numTokens * topk_);
    }
    if (context_.integrity) {
      verifyChoices(static_cast<int>(r), source, choices.data(), rows.weights.data());
    }
    requireIds(choices, static_cast<int>(r));
    rows.slots = placeChoices(choices.data(), source.numTokens, topk_, *request_.placement, self,
                              slotsPerExpert(), counts);
    handle->sources.push_back(std::move(rows));
    for (std::size_t e = 0; e < experts; ++e) {
      ranges[e * sources.size() + r] =
          std::int64_t{before[e]} << 32 | static_cast<std::int64_t>(counts[e] - before[e]);
    }
  }
  auto* recvCount = static_cast<std::int32_t*>(request_.outputs.recvCount.data);
  std::copy(counts.begin(), counts.end(), recvCount);
  if (!request_.outputs.recvStats) return;
  auto* stats = static_cast<std::int32_t*>(request_.outputs.recvStats.data);
  for (std::size_t e = 0; e < experts; ++e) stats[e] += counts[e];
}

/// A peer's ids were checked by the peer; a broken one must not make this rank write anywhere.
void DispatchReceive::requireIds(const std::vector<std::int32_t>& choices, int rank) const {
  const std::int64_t experts = request_.signature.numExperts;
  const bool sound = std::all_of(choices.begin(), choices.end(),
                                 [experts](std::int32_t id) { return id >= -1 && id < experts; });
  if (!sound) throw PeerFailure(cat("rank ", rank, " sent an id of no expert"));
}

void DispatchReceive::fetchRows(const std::vector<StagedTokens>& sources) {
  const TraceScope scope(context_.trace, "fetch rows");
  for (std::size_t r = 0; r < sources.size(); ++r) fetchRowsFrom(r, sources[r]);
}

void DispatchReceive::fetchRowsFrom(std::size_t rank, const StagedTokens& source) {
  forEachRow(rank, source,
             [&](std::int64_t token, std::int64_t slot) { fetchRow(slot, source, token); });
}

void DispatchReceive::verifyRows(const std::vector<StagedTokens>& sources) const {
  const TraceScope scope(context_.trace, "verify rows");
  for (std::size_t r = 0; r < sources.size(); ++r) {
    forEachRow(r, sources[r], [&](std::int64_t token, std::int64_t slot) {
      verifyRow(static_cast<int>(r), sources[r], token, slot);
    });
  }
}

/// Calls work(token, slot) for each row of a rank's tokens, on all threads.
template <typename Work>
void DispatchReceive::forEachRow(std::size_t rank, const StagedTokens& source,
                                 const Work& work) const {
  const std::vector<std::int32_t>& slots = handle->sources[rank].slots;
  context_.workers.run(source.numTokens, kTokensPerPart, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      const auto first = slots.begin() + token * topk_;
      for (auto slot = first; slot != first + topk_; ++slot) {
        // An expert that was chosen twice has one row.
        if (*slot >= 0 && std::find(first, slot, *slot) == slot) work(token, *slot);
      }
    }
  });
}

void DispatchReceive::fetchRow(std::int64_t slot, const StagedTokens& source, std::int64_t token) {
  const auto to = static_cast<std::size_t>(slot);
  const auto from = static_cast<std::size_t>(token);
  const LowLatencyDispatchOutputs& outputs = request_.outputs;
  std::byte* out = static_cast<std::byte*>(outputs.x.data) + to * format_.rowBytes;
  const std::byte* in = source.rows + from * format_.rowBytes;
  if (format_.rowBytes >= kStreamedRowBytes) {
    context_.kernels.streamCopy(out, in, format_.rowBytes);
  } else {
    std::memcpy(out, in, format_.rowBytes);
  }
  static_cast<std::int32_t*>(outputs.sourceIndex.data)[to] = static_cast<std::int32_t>(token);
}

/// The caller's array of scales is usually in column-major order: a row's are far from each other,
/// so those of an expert's rows are written together.
void DispatchReceive::fetchScales(const std::vector<StagedTokens>& sources) {
  const TraceScope scope(context_.trace, "fetch scales");
  const std::int64_t experts = request_.outputs.recvCount.shape[0];
  context_.workers.run(experts, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<const std::byte*> rows;
    for (std::int64_t expert = begin; expert < end; ++expert) {
      rows.clear();
      listScales(expert, sources, rows);
      writeScales(expert, rows);
    }
  });
}

/// The staged scales of an expert's rows, in their order.
void DispatchReceive::listScales(std::int64_t expert, const std::vector<StagedTokens>& sources,
                                 std::vector<const std::byte*>& rows) const {
  const auto ranks = static_cast<std::int64_t>(sources.size());
  const auto* ranges = static_cast<const std::int64_t*>(request_.outputs.layoutRange.data);
  const auto* tokens = static_cast<const std::int32_t*>(request_.outputs.sourceIndex.data);
  for (std::int64_t r = 0; r < ranks; ++r) {
    const auto count = static_cast<std::int32_t>(ranges[expert * ranks + r]);
    for (std::int32_t i = 0; i < count; ++i) {
      const std::int32_t token = tokens[expert * slotsPerExpert() + std::ssize(rows)];
      rows.push_back(sources[static_cast<std::size_t>(r)].scales +
                     static_cast<std::size_t>(token) * format_.scaleBytes);
    }
  }
}

void DispatchReceive::writeScales(std::int64_t expert, const std::vector<const std::byte*>& rows) {
  const TensorView& out = request_.outputs.scales;
  auto* words = static_cast<std::uint32_t*>(out.data) + expert * out.strides[0];
  std::size_t row = 0;
  if (scalesFillLines(words)) {
    for (; row < rows.size(); row += kScalesPerLine) {
      writeScaleLines(words + row, std::span(rows).subspan(row));
    }
  }
  for (; row < rows.size(); ++row) {
    std::uint32_t* to = words + static_cast<std::int64_t>(row) * out.strides[1];
    for (std::int64_t i = 0; i < out.shape[2]; ++i) {
      std::memcpy(to + i * out.strides[2], rows[row] + i * 4, sizeof(*to));
    }
  }
}

/// Whether an expert's scales lie in lines of their own, as where the caller left them to DeepEP's
/// order: then whole lines are written past the cache, which are not read before.
bool DispatchReceive::scalesFillLines(const std::uint32_t* words) const {
  const TensorView& out = request_.outputs.scales;
  constexpr auto kLine = static_cast<std::int64_t>(kScalesPerLine);
  return out.strides[1] == 1 && out.strides[2] % kLine == 0 && out.shape[1] % kLine == 0 &&
         reinterpret_cast<std::uintptr_t>(words) % kCacheLine == 0;
}

/// Writes a line of each column: the scales of up to so many rows, and zeros.
void DispatchReceive::writeScaleLines(std::uint32_t* out, std::span<const std::byte* const> rows) {
  const std::size_t count = std::min(rows.size(), kScalesPerLine);
  const TensorView& scales = request_.outputs.scales;
  alignas(kCacheLine) std::uint32_t line[kScalesPerLine] = {};
  for (std::int64_t i = 0; i < scales.shape[2]; ++i, out += scales.strides[2]) {
    for (std::size_t r = 0; r < count; ++r) std::memcpy(&line[r], rows[r] + i * 4, sizeof(line[r]));
    context_.kernels.streamCopy(out, line, sizeof(line));
  }
}

void DispatchReceive::readScales(std::int64_t slot, std::byte* scales) const {
  const TensorView& in = request_.outputs.scales;
  const auto* words = static_cast<const std::uint32_t*>(in.data) +
                      slot / slotsPerExpert() * in.strides[0] +
                      slot % slotsPerExpert() * in.strides[1];
  for (std::int64_t i = 0; i < in.shape[2]; ++i) {
    std::memcpy(scales + i * 4, words + i * in.strides[2], sizeof(std::uint32_t));
  }
}

void DispatchReceive::sealToken(std::int64_t token) const {
  const auto at = static_cast<std::size_t>(token);
  const std::uint64_t tag = packTag(context_.rank(), token, epoch);
  const std::uint64_t row = checksum(own_.rows + at * format_.rowBytes, format_.rowBytes);
  own_.sealOfRow(token) = {checksum(own_.scales + at * format_.scaleBytes, format_.scaleBytes, row),
                           tag};
  const float* weights = own_.weights == nullptr ? nullptr : own_.weights + token * topk_;
  own_.sealOfChoices(token) = {checksumOf(own_.topkIdx + token * topk_, weights), tag};
}

/// Of a token's choices.
std::uint64_t DispatchReceive::checksumOf(const std::int32_t* ids, const float* weights) const {
  const auto choices = static_cast<std::size_t>(topk_);
  const std::uint64_t sum = checksum(ids, choices * sizeof(*ids));
  return weights == nullptr ? sum : checksum(weights, choices * sizeof(*weights), sum);
}

/// Of all tokens, also those of which no row is fetched: a choice may have been damaged to look so.
void DispatchReceive::verifyChoices(int rank, const StagedTokens& source, const std::int32_t* ids,
                                    const float* weights) const {
  if (rank == context_.rank() || source.seals == nullptr) return;
  for (std::int64_t token = 0; token < source.numTokens; ++token) {
    const float* own = source.weights == nullptr ? nullptr : weights + token * topk_;
    verifier_.check(rank, token, checksumOf(ids + token * topk_, own), source.sealOfChoices(token));
  }
  verifier_.throwIfDamaged();
}

/// Compares what the caller finds in a slot.
void DispatchReceive::verifyRow(int rank, const StagedTokens& source, std::int64_t token,
                                std::int64_t slot) const {
  if (rank == context_.rank()) return;
  const auto* row = static_cast<const std::byte*>(request_.outputs.x.data) +
                    static_cast<std::size_t>(slot) * format_.rowBytes;
  std::uint64_t sum = checksum(row, format_.rowBytes);
  std::vector<std::byte> scales(format_.scaleBytes);
  if (format_.numScales > 0) readScales(slot, scales.data());
  sum = checksum(scales.data(), scales.size(), sum);
  verifier_.check(rank, token, sum, source.sealOfRow(token));
}

}  // namespace

std::unique_ptr<LowLatencyReceive> sendLowLatencyDispatch(LowLatencyLane& lane,
                                                          LowLatencyDispatchRequest request) {
  auto dispatch = std::make_unique<DispatchReceive>(lane, std::move(request));
  dispatch->send();
  return dispatch;
}

}  // namespace mscclpp_ep::cpu
