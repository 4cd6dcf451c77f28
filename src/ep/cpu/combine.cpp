// SPDX-License-Identifier: MIT
#include "cpu/combine.hpp"

#include <algorithm>

#include "cpu/columns.hpp"
#include "cpu/integrity.hpp"
#include "cpu/progress.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cpu {

namespace {

// Rows that are staged are read soon after they were written, while they are in some cache.
constexpr std::size_t kStagingStepBytes = std::size_t{256} << 10;
constexpr std::int64_t kTokensPerPart = 16;

/// One combine, on one rank: at once the owner of rows that others read, and a reader.
class RowReducer {
 public:
  RowReducer(Context& context, const CombineRequest& request)
      : context_(context),
        request_(request),
        handle_(*request.handle),
        rowBytes_(static_cast<std::size_t>(request.signature.hidden) *
                  itemSize(request.inputs.x.dtype)),
        weightBytes_(request.inputs.topkWeights
                         ? static_cast<std::size_t>(request.signature.topk) * sizeof(float)
                         : 0),
        verifier_(context, "combine"),
        step_(std::max<std::int64_t>(static_cast<std::int64_t>(kStagingStepBytes / rowBytes_), 1) *
              context.workers.numThreads()),
        sources_(static_cast<std::size_t>(context.size())) {}

  void run() {
    offerInputs();
    receiveOffers();
    const std::vector<bool> known = masks();
    reduceAll();
    // A rank that was masked on the way is missing from every token or from none.
    if (masks() != known) reduceStep(0, handle_.numTokens);
    try {
      // A rank that gave up may have let its caller overwrite the rows, also those read already.
      context_.requireNobodyGaveUp();
    } catch (const OperationRefused&) {
      finish();  // the others wait for this rank's word all the same
      throw;
    }
    verifier_.throwIfDamaged();
    finish();
  }

 private:
  struct Source {
    const std::byte* rows = nullptr;  ///< of this rank's first token there
    const std::byte* weights = nullptr;
    const RowSeal* seals = nullptr;  ///< in the integrity mode, of another rank's rows
    std::int64_t count = 0;          ///< rows of this rank's tokens there
    bool staged = false;             ///< they are still being copied to where they are read
  };

  void offerInputs();
  void stage(std::size_t rows, std::size_t weights, std::size_t seals);
  void sealRows(std::int64_t begin, std::int64_t end);
  std::uint64_t checksumOf(const std::byte* row, const std::byte* weights) const;
  void verify(std::size_t rank, std::int64_t token, std::int32_t ordinal) const;
  void receiveOffers();
  void bindSource(std::size_t rank, const CombineEntry& entry);
  bool stageSome();
  void reduceAll();
  void awaitTokens(std::int64_t end);
  void reduceStep(std::int64_t begin, std::int64_t end);
  Awaited notReady(std::int64_t end) const;
  bool tokensReady(std::int64_t end) const { return notReady(end).ranks.empty(); }
  void reduceTokens(std::int64_t begin, std::int64_t end) const;
  void reduceToken(std::int64_t token, std::vector<const void*>& rows,
                   std::vector<const void*>& weights) const;
  void finish();

  std::vector<bool> masks() const {
    std::vector<bool> masked(sources_.size());
    for (std::size_t r = 0; r < masked.size(); ++r) masked[r] = context_.masked(r);
    return masked;
  }
  std::int64_t rowsKeptFrom(std::size_t rank) const {
    return rowsKept(handle_.firstRowFrom[rank], handle_.numRowsFrom[rank], handle_.numRows);
  }
  std::int64_t numReceived() const { return std::min(handle_.numRecv(), handle_.numRows); }
  std::int32_t head(std::int64_t token, std::size_t rank) const {
    return handle_.plan->head[static_cast<std::size_t>(token) * sources_.size() + rank];
  }

  Context& context_;
  const CombineRequest& request_;
  const HandleState& handle_;
  const std::size_t rowBytes_;
  const std::size_t weightBytes_;
  const RowVerifier verifier_;
  const std::int64_t step_;  ///< rows or tokens between two looks at progress
  ArrayAddress rowsAddress_;
  ArrayAddress weightsAddress_;
  ArrayAddress sealsAddress_;
  ArenaBlock block_;  ///< in which inputs are copied for peers
  std::byte* staging_ = nullptr;
  RowSeal* seals_ = nullptr;  ///< of all rows that others read
  std::int64_t staged_ = 0;   ///< rows for each rank
  std::vector<Source> sources_;
};

/// Makes this rank's rows readable by the others: in place, or in a block they are copied to.
void RowReducer::offerInputs() {
  if (numReceived() == 0 || context_.size() == 1) return;
  try {
    const std::size_t rows = arrayBytes(numReceived(), rowBytes_);
    const std::size_t weights = arrayBytes(numReceived(), weightBytes_);
    const auto rowsInPlace = context_.arena.locate(request_.inputs.x.data, rows);
    const auto weightsInPlace = context_.arena.locate(request_.inputs.topkWeights.data, weights);
    const std::size_t seals = sealBytes(context_, numReceived());
    context_.arena.noteOperation(alignUp(rows, kPage) + alignUp(weights, kPage) +
                                 alignUp(seals, kPage));
    (rowsInPlace ? context_.stats.pulledRows : context_.stats.stagedRows) += numReceived();
    stage(rowsInPlace ? 0 : rows, weightsInPlace ? 0 : weights, seals);
    if (rowsInPlace) rowsAddress_ = *rowsInPlace;
    if (weightsInPlace) weightsAddress_ = *weightsInPlace;
  } catch (const Error& error) {
    postRefusal(context_, Operation::combine, error.what());
    throw OperationRefused{std::current_exception()};
  }
  if (staging_ != nullptr) return;  // else rows are sealed as they are staged
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    if (static_cast<int>(r) == context_.rank()) continue;
    sealRows(handle_.firstRowFrom[r], handle_.firstRowFrom[r] + rowsKeptFrom(r));
  }
}

/// Finds a block for what does not lie in the arena. The weights, few bytes, are copied at once.
void RowReducer::stage(std::size_t rows, std::size_t weights, std::size_t seals) {
  if (rows + weights + seals == 0) return;
  const std::size_t behindRows = alignUp(rows, kPage);
  const std::size_t behindWeights = behindRows + alignUp(weights, kCacheLine);
  if (auto block = context_.arena.allocate(behindWeights + seals)) {
    block_ = std::move(*block);
  } else {
    block_ = context_.arena.landing(behindWeights + seals);
  }
  ArrayAddress address = block_.address;
  if (rows > 0) {
    staging_ = block_.data.get();
    address.access = Access::staged;
    rowsAddress_ = address;
  }
  if (weights > 0) {
    std::memcpy(block_.data.get() + behindRows, request_.inputs.topkWeights.data, weights);
    weightsAddress_ = {Access::straight, address.segment, address.offset + behindRows};
  }
  if (seals > 0) {
    seals_ = reinterpret_cast<RowSeal*>(block_.data.get() + behindWeights);
    sealsAddress_ = {Access::straight, address.segment, address.offset + behindWeights};
  }
}

/// Made from the caller's memory, so that also a copy that goes wrong is found.
void RowReducer::sealRows(std::int64_t begin, std::int64_t end) {
  if (seals_ == nullptr) return;
  const auto* rows = static_cast<const std::byte*>(request_.inputs.x.data);
  const auto* weights = static_cast<const std::byte*>(request_.inputs.topkWeights.data);
  context_.workers.run(end - begin, kTokensPerPart, [&](std::int64_t from, std::int64_t to) {
    for (auto row = static_cast<std::size_t>(begin + from);
         row < static_cast<std::size_t>(begin + to); ++row) {
      seals_[row].checksum = checksumOf(rows + row * rowBytes_, weights + row * weightBytes_);
      seals_[row].tag = packTag(context_.rank(), handle_.sourceTokens[row], context_.epoch);
    }
  });
}

std::uint64_t RowReducer::checksumOf(const std::byte* row, const std::byte* weights) const {
  return checksum(weights, weightBytes_, checksum(row, rowBytes_));
}

/// Also reads the row that is summed next, so that it comes from the cache then.
void RowReducer::verify(std::size_t rank, std::int64_t token, std::int32_t ordinal) const {
  const Source& source = sources_[rank];
  const auto at = static_cast<std::size_t>(ordinal);
  verifier_.check(static_cast<int>(rank), token,
                  checksumOf(source.rows + at * rowBytes_, source.weights + at * weightBytes_),
                  source.seals[at]);
}

void RowReducer::receiveOffers() {
  CombineEntry entry;
  entry.signature = request_.signature;
  entry.rows = rowsAddress_;
  entry.weights = weightsAddress_;
  entry.seals = sealsAddress_;
  const std::vector<Message> outgoing(sources_.size(), encode(entry));
  const auto& entries = exchangeEntries(context_, outgoing);
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    if (!entries[r].empty()) bindSource(r, decode<CombineEntry>(entries[r]));
  }
}

void RowReducer::bindSource(std::size_t rank, const CombineEntry& entry) {
  Source& source = sources_[rank];
  const std::int64_t first = handle_.firstRowAt[rank];
  source.count = rowsKept(first, handle_.plan->numRows[rank], handle_.capacityAt[rank]);
  if (source.count == 0) return;
  if (static_cast<int>(rank) == context_.rank()) {
    const auto skip = static_cast<std::size_t>(first);
    source.rows = static_cast<const std::byte*>(request_.inputs.x.data) + skip * rowBytes_;
    source.weights =
        static_cast<const std::byte*>(request_.inputs.topkWeights.data) + skip * weightBytes_;
    return;
  }
  const int peer = static_cast<int>(rank);
  const RowRange range{first, source.count};
  source.staged = entry.rows.access == Access::staged;
  source.rows =
      peerRows(context_, peer, entry.rows, range, rowBytes_, itemSize(request_.inputs.x.dtype));
  if (context_.integrity) {
    source.seals = reinterpret_cast<const RowSeal*>(
        peerRows(context_, peer, entry.seals, range, sizeof(RowSeal), alignof(RowSeal)));
  }
  if (weightBytes_ == 0) return;
  source.weights = peerRows(context_, peer, entry.weights, range, weightBytes_, sizeof(float));
}

/// Copies the next rows for each of the others. False if none are left.
bool RowReducer::stageSome() {
  if (staging_ == nullptr) return false;
  const TraceScope scope(context_.trace, "stage rows");
  const auto* input = static_cast<const std::byte*>(request_.inputs.x.data);
  bool more = false;
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    const std::int64_t count = rowsKeptFrom(r);
    if (static_cast<int>(r) == context_.rank() || staged_ >= count || context_.masked(r)) continue;
    const std::int64_t end = std::min(staged_ + step_, count);
    const std::int64_t first = handle_.firstRowFrom[r] + staged_;
    context_.workers.run(end - staged_, kTokensPerPart, [&](std::int64_t from, std::int64_t to) {
      const std::size_t offset = static_cast<std::size_t>(first + from) * rowBytes_;
      std::memcpy(staging_ + offset, input + offset,
                  static_cast<std::size_t>(to - from) * rowBytes_);
    });
    sealRows(first, handle_.firstRowFrom[r] + end);
    context_.raise(kRowsStaged, static_cast<int>(r), end);
    more = more || end < count;
  }
  staged_ += step_;
  return more;
}

void RowReducer::reduceAll() {
  const bool waits =
      staging_ != nullptr || std::any_of(sources_.begin(), sources_.end(),
                                         [](const Source& source) { return source.staged; });
  const std::int64_t step = waits ? step_ : std::max<std::int64_t>(handle_.numTokens, 1);
  bool staging = stageSome();
  for (std::int64_t begin = 0; begin < handle_.numTokens; begin += step) {
    const std::int64_t end = std::min(begin + step, handle_.numTokens);
    while (staging && !tokensReady(end)) staging = stageSome();
    awaitTokens(end);
    reduceStep(begin, end);
    if (staging) staging = stageSome();
  }
  while (staging) staging = stageSome();
}

void RowReducer::awaitTokens(std::int64_t end) {
  if (tokensReady(end)) return;
  const TraceScope scope(context_.trace, "await rows");
  context_.transport.wait([&] { return tokensReady(end); }, [&] { return notReady(end); });
}

void RowReducer::reduceStep(std::int64_t begin, std::int64_t end) {
  const TraceScope scope(context_.trace, "reduce");
  context_.workers.run(end - begin, kTokensPerPart, [&](std::int64_t from, std::int64_t to) {
    reduceTokens(begin + from, begin + to);
  });
}

/// The ranks of which rows of the tokens before `end` cannot be read yet.
Awaited RowReducer::notReady(std::int64_t end) const {
  Awaited late{{}, "the staged rows"};
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    const Source& source = sources_[r];
    if (!source.staged || context_.masked(r)) continue;
    std::int64_t token = end;
    while (token > 0 && head(token - 1, r) < 0) --token;
    const std::int64_t needed =
        token == 0 ? 0 : std::min<std::int64_t>(head(token - 1, r) + 1, source.count);
    const int rank = static_cast<int>(r);
    if (context_.raised(kRowsStaged, rank) < needed) late.ranks.push_back(rank);
  }
  return late;
}

void RowReducer::reduceTokens(std::int64_t begin, std::int64_t end) const {
  std::vector<const void*> rows;
  std::vector<const void*> weights;
  for (std::int64_t token = begin; token < end; ++token) reduceToken(token, rows, weights);
}

void RowReducer::reduceToken(std::int64_t token, std::vector<const void*>& rows,
                             std::vector<const void*>& weights) const {
  const CombineInputs& inputs = request_.inputs;
  const auto at = static_cast<std::size_t>(token);
  rows.clear();
  weights.clear();
  for (const TensorView* bias : {&inputs.bias0, &inputs.bias1}) {
    if (*bias) rows.push_back(static_cast<const std::byte*>(bias->data) + at * rowBytes_);
  }
  // The sum begins with bias0 + bias1, an absent one being +0. With both there is no +0 in it,
  // which shows if both are -0.
  const float start = rows.size() == 2 ? -0.0F : 0.0F;
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    const std::int32_t ordinal = head(token, r);
    if (ordinal < 0 || ordinal >= sources_[r].count || context_.masked(r)) continue;
    if (sources_[r].seals != nullptr) verify(r, token, ordinal);
    rows.push_back(sources_[r].rows + static_cast<std::size_t>(ordinal) * rowBytes_);
    weights.push_back(sources_[r].weights + static_cast<std::size_t>(ordinal) * weightBytes_);
  }
  const auto type = static_cast<std::size_t>(sumType(inputs.x.dtype));
  context_.kernels.sum[type](
      static_cast<std::byte*>(request_.outputs.x.data) + at * rowBytes_, rows.data(), rows.size(),
      static_cast<std::size_t>(request_.signature.hidden), start, rowBytes_ >= kStreamedRowBytes);
  if (weightBytes_ == 0) return;
  const auto weightType = static_cast<std::size_t>(SumType::float32);
  context_.kernels.sum[weightType](
      static_cast<std::byte*>(request_.outputs.topkWeights.data) + at * weightBytes_,
      weights.data(), weights.size(), static_cast<std::size_t>(request_.signature.topk), 0.0F,
      false);
}

/// Returns when nobody reads this rank's memory any more.
void RowReducer::finish() {
  // Every combine writes every word, so that none is old enough to be taken for a new one.
  for (int peer = 0; peer < context_.size() && staging_ == nullptr; ++peer) {
    if (peer != context_.rank()) context_.raise(kRowsStaged, peer, 0);
  }
  finishReading(context_);
}

}  // namespace

void combineRows(Context& context, const CombineRequest& request) {
  RowReducer(context, request).run();
}

}  // namespace mscclpp_ep::cpu
