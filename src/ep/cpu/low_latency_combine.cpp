// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstring>

#include "core/logfmt.hpp"
#include "cpu/columns.hpp"
#include "cpu/integrity.hpp"
#include "cpu/low_latency.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cpu {

namespace {

constexpr std::int64_t kTokensPerPart = 8;

/// How many rows the choices of a rank's tokens make: one more than the highest ordinal.
std::int64_t numOrdinals(const std::vector<std::int32_t>& ordinals) {
  return ordinals.empty() ? 0 : *std::max_element(ordinals.begin(), ordinals.end()) + 1;
}

/// The rows of which one token's result is the sum.
struct Summands {
  std::vector<const void*> rows;
  std::vector<float> weights;
  std::vector<std::uint16_t> decoded;  ///< rows that came as LogFMT

  void clear() {
    rows.clear();
    weights.clear();
  }
};

/// One combine, on one rank: at once the sender of what its experts made of others' tokens, and
/// the receiver of what others' experts made of its own.
class CombineReceive final : public LowLatencyReceive {
 public:
  CombineReceive(LowLatencyLane& of, LowLatencyCombineRequest request)
      : LowLatencyReceive(of),
        request_(std::move(request)),
        state_(*request_.handle),
        context_(of.context),
        topk_(static_cast<std::size_t>(state_.topk)),
        hidden_(static_cast<std::size_t>(request_.signature.hidden)),
        rowBytes_(hidden_ * itemSize(request_.inputs.x.dtype)),
        stagedBytes_(request_.options.logfmt ? logfmtRowBytes(hidden_) : rowBytes_),
        type_(static_cast<std::size_t>(sumType(request_.inputs.x.dtype))),
        verifier_(context_, "low-latency combine") {
    bufferId = context_.bufferId;
  }

  const char* name() const override { return "low-latency combine"; }
  void send();
  void receive() override;

 private:
  void reserve();
  void sealWeights() const;
  void post();
  void collect();
  void bindWeights();
  void verifyWeights(std::size_t rank) const;
  void stageRows();
  void stageToken(std::size_t source, std::int64_t token) const;
  void stagePartialSum(const std::int32_t* slots, const float* weights, std::byte* out) const;
  void bindRows();
  void awaitRows();
  void sumToken(std::int64_t token, Summands& summands) const;
  void addRowsOfExperts(std::int64_t token, Summands& summands) const;
  void addSumsOfRanks(std::int64_t token, Summands& summands) const;
  void addRow(std::size_t rank, std::int64_t token, std::int32_t ordinal, Summands& summands) const;

  std::size_t numRanks() const { return static_cast<std::size_t>(context_.size()); }
  /// Whether peers read this rank's weights, and it theirs.
  bool weightsTravel() const { return !request_.options.exact && !state_.hasWeights; }
  std::size_t self() const { return static_cast<std::size_t>(context_.rank()); }
  const std::byte* slot(std::int32_t index) const {
    return static_cast<const std::byte*>(request_.inputs.x.data) +
           static_cast<std::size_t>(index) * rowBytes_;
  }
  bool sends(std::size_t rank) const {
    return rowsFrom_[rank] != nullptr && !context_.masked(rank);
  }
  const float* ownWeights() const {
    return static_cast<const float*>(request_.inputs.topkWeights.data);
  }

  const LowLatencyCombineRequest request_;
  const LowLatencyState& state_;
  Context& context_;
  const std::size_t topk_;
  const std::size_t hidden_;
  const std::size_t rowBytes_;
  const std::size_t stagedBytes_;  ///< of a row on its way
  const std::size_t type_;
  const RowVerifier verifier_;

  // As a sender, by the rank whose tokens they are.
  std::vector<std::vector<std::int32_t>> sendOrdinals_;  ///< [T, K]
  std::vector<std::size_t> rowsOffset_;                  ///< in the staging
  std::vector<const float*> weightsOf_;                  ///< [T, K]
  std::size_t weightsOffset_ = 0;
  std::size_t weightSealsOffset_ = 0;
  std::vector<std::size_t> rowSealsOffset_;

  // As the receiver, by the rank of the experts.
  std::vector<std::vector<std::int32_t>> ordinals_;  ///< [T, K]
  std::vector<LowLatencyCombineEntry> entries_;      ///< empty until they are collected
  std::vector<const std::byte*> rowsFrom_;
  std::vector<const RowSeal*> sealsFrom_;  ///< in the integrity mode; null: this rank's own
};

void CombineReceive::send() {
  reserve();
  post();
  if (weightsTravel()) {
    collect();
    bindWeights();
  }
  stageRows();
}

/// Finds room for this rank's weights, and for the rows that go back to each rank.
void CombineReceive::reserve() {
  StagingPlan plan;
  const auto choices = static_cast<std::size_t>(state_.numTokens) * topk_;
  weightsOffset_ = plan.add(choices * sizeof(float));
  weightSealsOffset_ = plan.add(weightsTravel() ? sealBytes(context_, state_.numTokens) : 0);
  for (std::size_t r = 0; r < numRanks(); ++r) {
    const SourceRows& source = state_.sources[r];
    // Slots tell experts apart as well as ids do.
    sendOrdinals_.push_back(returnOrdinals(source.slots, state_.topk, request_.options.exact));
    rowsOffset_.push_back(
        plan.add(static_cast<std::size_t>(numOrdinals(sendOrdinals_.back())) * stagedBytes_));
    rowSealsOffset_.push_back(plan.add(sealBytes(context_, numOrdinals(sendOrdinals_.back()))));
    weightsOf_.push_back(source.weights.data());
    const auto own = choicesOf(state_.topkIdx, *state_.placement, static_cast<int>(r));
    ordinals_.push_back(returnOrdinals(own, state_.topk, request_.options.exact));
  }
  lane.staging.reserve(std::max<std::size_t>(plan.bytes(), 1));
  std::copy_n(ownWeights(), choices,
              reinterpret_cast<float*>(lane.staging.data() + weightsOffset_));
  if (context_.integrity && weightsTravel()) sealWeights();
}

void CombineReceive::sealWeights() const {
  auto* seals = reinterpret_cast<RowSeal*>(lane.staging.data() + weightSealsOffset_);
  for (std::int64_t token = 0; token < state_.numTokens; ++token) {
    const float* weights = ownWeights() + static_cast<std::size_t>(token) * topk_;
    seals[token] = {checksum(weights, topk_ * sizeof(float)),
                    packTag(context_.rank(), token, epoch)};
  }
}

void CombineReceive::post() {
  std::vector<Message> outgoing;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    LowLatencyCombineEntry entry;
    entry.signature = request_.signature;
    entry.weights = lane.staging.address(weightsOffset_);
    entry.rows = lane.staging.address(rowsOffset_[r]);
    entry.numRows = numOrdinals(sendOrdinals_[r]);
    entry.weightSeals = lane.staging.address(weightSealsOffset_);
    entry.rowSeals = lane.staging.address(rowSealsOffset_[r]);
    outgoing.push_back(encode(entry));
  }
  lane.noteReaders();
  context_.mailbox.post(epoch, static_cast<std::uint32_t>(Round::entry), outgoing,
                        "room for a message");
}

void CombineReceive::collect() {
  const TraceScope scope(context_.trace, "await entries");
  const auto& entries = context_.mailbox.collect(epoch, static_cast<std::uint32_t>(Round::entry),
                                                 "the entry into the operation");
  requireEntries(context_, entries);
  for (const Message& entry : entries) {
    // A masked rank has none.
    entries_.push_back(entry.empty() ? LowLatencyCombineEntry{}
                                     : decode<LowLatencyCombineEntry>(entry));
  }
}

void CombineReceive::bindWeights() {
  for (std::size_t r = 0; r < numRanks(); ++r) {
    if (r == self()) {
      weightsOf_[r] = ownWeights();
      continue;
    }
    weightsOf_[r] = nullptr;
    if (context_.masked(r)) continue;
    weightsOf_[r] = reinterpret_cast<const float*>(
        peerRows(context_, static_cast<int>(r), entries_[r].weights,
                 {0, state_.sources[r].numTokens}, topk_ * sizeof(float), sizeof(float)));
    if (context_.integrity) verifyWeights(r);
  }
  verifier_.throwIfDamaged();
}

void CombineReceive::verifyWeights(std::size_t rank) const {
  const std::int64_t tokens = state_.sources[rank].numTokens;
  const auto* seals = reinterpret_cast<const RowSeal*>(
      peerRows(context_, static_cast<int>(rank), entries_[rank].weightSeals, {0, tokens},
               sizeof(RowSeal), alignof(RowSeal)));
  for (std::int64_t token = 0; token < tokens; ++token) {
    const float* weights = weightsOf_[rank] + static_cast<std::size_t>(token) * topk_;
    verifier_.check(static_cast<int>(rank), token, checksum(weights, topk_ * sizeof(float)),
                    seals[token]);
  }
}

/// Not before rows are received: other operations may come between, in which a transport lets go of
/// what a peer does not share any more.
void CombineReceive::bindRows() {
  for (std::size_t r = 0; r < numRanks(); ++r) {
    if (r == self()) {
      rowsFrom_.push_back(lane.staging.data() + rowsOffset_[r]);
      sealsFrom_.push_back(nullptr);
      continue;
    }
    const LowLatencyCombineEntry& entry = entries_[r];
    if (context_.masked(r) || entry.numRows == 0) {
      rowsFrom_.push_back(nullptr);
      sealsFrom_.push_back(nullptr);
      continue;
    }
    const RowRange range{0, numOrdinals(ordinals_[r])};
    if (entry.numRows != range.count) {
      throw PeerFailure(
          cat("rank ", r, " sends ", entry.numRows, " rows; this rank expects ", range.count));
    }
    rowsFrom_.push_back(
        peerRows(context_, static_cast<int>(r), entry.rows, range, stagedBytes_, alignof(float)));
    sealsFrom_.push_back(context_.integrity ? reinterpret_cast<const RowSeal*>(peerRows(
                                                  context_, static_cast<int>(r), entry.rowSeals,
                                                  range, sizeof(RowSeal), alignof(RowSeal)))
                                            : nullptr);
  }
}

/// The next rank's rows first, so that not all wait for the same one.
void CombineReceive::stageRows() {
  const TraceScope scope(context_.trace, "stage sums");
  for (std::size_t step = 1; step <= numRanks(); ++step) {
    const std::size_t r = (self() + step) % numRanks();
    if (context_.masked(r)) continue;
    context_.workers.run(state_.sources[r].numTokens, kTokensPerPart,
                         [&](std::int64_t begin, std::int64_t end) {
                           for (std::int64_t t = begin; t < end; ++t) stageToken(r, t);
                         });
    if (r != self()) context_.raise(kRowsStaged, static_cast<int>(r), 0);
  }
}

void CombineReceive::stageToken(std::size_t source, std::int64_t token) const {
  const auto first = static_cast<std::size_t>(token) * topk_;
  const std::int32_t* slots = state_.sources[source].slots.data() + first;
  const std::int32_t* ordinals = sendOrdinals_[source].data() + first;
  std::byte* rows = lane.staging.data() + rowsOffset_[source];
  for (std::size_t k = 0; k < topk_; ++k) {
    if (slots[k] < 0 || std::find(ordinals, ordinals + k, ordinals[k]) != ordinals + k) continue;
    std::byte* out = rows + static_cast<std::size_t>(ordinals[k]) * stagedBytes_;
    // Encoded rows differ in length; the checksum is of all the room for one.
    if (context_.integrity && request_.options.logfmt) std::memset(out, 0, stagedBytes_);
    if (!request_.options.exact) {
      stagePartialSum(slots, weightsOf_[source] + first, out);
    } else if (request_.options.logfmt) {
      encodeLogfmt({reinterpret_cast<const std::uint16_t*>(slot(slots[k])), hidden_}, out);
    } else {
      context_.kernels.copy(out, slot(slots[k]), rowBytes_);
    }
    if (!context_.integrity) continue;
    auto* seals = reinterpret_cast<RowSeal*>(lane.staging.data() + rowSealsOffset_[source]);
    seals[ordinals[k]] = {checksum(out, stagedBytes_), packTag(context_.rank(), token, epoch)};
  }
}

/// The sum of a token's rows of this rank's experts, in order of its choices.
void CombineReceive::stagePartialSum(const std::int32_t* slots, const float* weights,
                                     std::byte* out) const {
  thread_local std::vector<const void*> rows;
  thread_local std::vector<float> scales;
  rows.clear();
  scales.clear();
  for (std::size_t k = 0; k < topk_; ++k) {
    if (slots[k] < 0) continue;
    rows.push_back(slot(slots[k]));
    scales.push_back(weights[k]);
  }
  if (!request_.options.logfmt) {
    return context_.kernels.weightedSum[type_](out, rows.data(), scales.data(), rows.size(),
                                               hidden_);
  }
  thread_local std::vector<std::uint16_t> sum;
  sum.resize(hidden_);
  context_.kernels.weightedSum[type_](sum.data(), rows.data(), scales.data(), rows.size(), hidden_);
  encodeLogfmt(sum, out);
}

void CombineReceive::receive() {
  if (entries_.empty()) collect();
  bindRows();
  awaitRows();
  const TraceScope scope(context_.trace, "reduce");
  context_.workers.run(state_.numTokens, kTokensPerPart, [&](std::int64_t begin, std::int64_t end) {
    Summands summands;
    for (std::int64_t t = begin; t < end; ++t) sumToken(t, summands);
  });
  verifier_.throwIfDamaged();
}

void CombineReceive::awaitRows() {
  const TraceScope scope(context_.trace, "await rows");
  const WaitClock clock(request_.outputs.waitStats);
  std::vector<bool> here(numRanks());
  here[self()] = true;
  const auto missing = [&] {
    Awaited late{{}, "the rows"};
    for (std::size_t r = 0; r < numRanks(); ++r) {
      if (here[r] || context_.masked(r)) continue;
      const int rank = static_cast<int>(r);
      here[r] = context_.raised(kRowsStaged, rank) >= 0;
      if (here[r]) {
        clock.add(rank);
      } else {
        late.ranks.push_back(rank);
      }
    }
    return late;
  };
  context_.transport.wait([&] { return missing().ranks.empty(); }, missing);
}

void CombineReceive::sumToken(std::int64_t token, Summands& summands) const {
  auto* out = static_cast<std::byte*>(request_.outputs.x.data) +
              static_cast<std::size_t>(token) * rowBytes_;
  summands.clear();
  std::vector<const void*>& rows = summands.rows;
  if (request_.options.exact) {
    addRowsOfExperts(token, summands);
    return context_.kernels.weightedSum[type_](out, rows.data(), summands.weights.data(),
                                               rows.size(), hidden_);
  }
  addSumsOfRanks(token, summands);
  context_.kernels.sum[type_](out, rows.data(), rows.size(), hidden_, 0.0F, false);
}

void CombineReceive::addRowsOfExperts(std::int64_t token, Summands& summands) const {
  const std::size_t first = static_cast<std::size_t>(token) * topk_;
  for (std::size_t k = 0; k < topk_; ++k) {
    const std::int32_t expert = state_.topkIdx[first + k];
    if (expert < 0) continue;
    const auto owner = static_cast<std::size_t>(state_.placement->owner(expert));
    if (!sends(owner)) continue;
    addRow(owner, token, ordinals_[owner][first + k], summands);
    summands.weights.push_back(ownWeights()[first + k]);
  }
}

void CombineReceive::addSumsOfRanks(std::int64_t token, Summands& summands) const {
  const std::size_t first = static_cast<std::size_t>(token) * topk_;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    if (!sends(r)) continue;
    const std::int32_t* ordinals = ordinals_[r].data() + first;
    const std::int32_t* found =
        std::find_if(ordinals, ordinals + topk_, [](std::int32_t o) { return o >= 0; });
    if (found != ordinals + topk_) addRow(r, token, *found, summands);
  }
}

/// Adds a row that came back for a token.
void CombineReceive::addRow(std::size_t rank, std::int64_t token, std::int32_t ordinal,
                            Summands& summands) const {
  const auto at = static_cast<std::size_t>(ordinal);
  const std::byte* row = rowsFrom_[rank] + at * stagedBytes_;
  if (sealsFrom_[rank] != nullptr) {
    verifier_.check(static_cast<int>(rank), token, checksum(row, stagedBytes_),
                    sealsFrom_[rank][at]);
  }
  if (!request_.options.logfmt) return summands.rows.push_back(row);
  summands.decoded.resize(std::max(numRanks(), topk_) * hidden_);
  const std::span decoded(summands.decoded.data() + summands.rows.size() * hidden_, hidden_);
  decodeLogfmt(row, decoded);
  summands.rows.push_back(decoded.data());
}

}  // namespace

std::unique_ptr<LowLatencyReceive> sendLowLatencyCombine(LowLatencyLane& lane,
                                                         LowLatencyCombineRequest request) {
  auto combine = std::make_unique<CombineReceive>(lane, std::move(request));
  combine->send();
  return combine;
}

}  // namespace mscclpp_ep::cpu
