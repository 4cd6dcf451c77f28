// SPDX-License-Identifier: MIT
#include "cpu/dispatch.hpp"

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/columns.hpp"
#include "cpu/integrity.hpp"
#include "cpu/landing.hpp"
#include "cpu/progress.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cpu {

namespace {

constexpr std::int64_t kTokensPerPart = 16;
// A rank whose rows land looks at least this often at what has come while it sends.
constexpr std::int64_t kTokensPerLook = 64;

template <typename T>
std::shared_ptr<std::vector<T>> shared(std::vector<T> values) {
  return std::make_shared<std::vector<T>>(std::move(values));
}

/// The second half of a dispatch, on one rank.
class RowMover {
 public:
  RowMover(Context& context, const DispatchRequest& request, const DispatchPlan& plan,
           const DispatchOutputs& outputs)
      : context_(context),
        request_(request),
        plan_(plan),
        writer_(request, context),
        numKeptFrom_(plan.numKeptFrom()),
        landing_(context, numKeptFrom_, plan.firstRowFrom),
        targets_(static_cast<std::size_t>(context.size())) {
    try {
      bindOutputs(outputs);
    } catch (const Error& error) {
      abandonRows(context, Verdict::noRoom, error.what());
      throw OperationRefused{std::current_exception()};
    }
  }

  std::shared_ptr<const HandleState> run() {
    receivePublications(publish());
    sendRows();
    awaitRows();
    if (context_.integrity) verifyRows();
    markMissingRows();
    return makeHandle();
  }

 private:
  void bindOutputs(const DispatchOutputs& outputs);
  Tensor allocateRows(DataType dtype);
  const std::vector<Message>& publish();
  void receivePublications(const std::vector<Message>& publications);
  void bindTarget(std::size_t rank, const DispatchPublish& publication);
  void sendRows();
  void sendTokens(std::int64_t begin, std::int64_t end);
  std::int64_t rowsAmong(std::size_t rank, std::int64_t numTokens) const;
  template <typename Room>
  void awaitRoom(const Room& room, std::int64_t numTokens);
  Awaited withoutRoom(std::int64_t numTokens) const;
  void raisePushed(std::int64_t sentTokens);
  void awaitRows();
  void verifyRows() const;
  std::uint64_t checksumOf(std::int64_t row) const;
  template <typename Index>
  std::uint64_t addTopk(std::uint64_t sum, std::int64_t row) const;
  void forsake(std::size_t rank);
  void markMissingRows();
  std::shared_ptr<const HandleState> makeHandle();

  std::size_t numRanks() const { return targets_.size(); }
  std::int64_t rowBytes(int column) const {
    return static_cast<std::int64_t>(writer_.rowBytes(column));
  }

  /// Of what is written element by element; rows and scales are copied as bytes.
  std::size_t elementBytes(int column) const {
    if (column == kTopkIdx) return itemSize(request_.inputs.topkIdx.dtype);
    return column == kTopkWeights || column == kSourceIndex ? sizeof(std::int32_t) : 1;
  }

  Context& context_;
  const DispatchRequest& request_;
  const DispatchPlan& plan_;
  const RowWriter writer_;
  const std::vector<std::int64_t> numKeptFrom_;
  OutputColumn outputs_[kNumColumns];
  Tensor sourceIndex_;
  Tensor checksums_;
  Tensor tags_;
  Landing landing_;
  std::vector<RowWriter::Target> targets_;
  std::vector<bool> told_;  ///< which ranks may know where rows go
  std::int64_t step_ = 0;   ///< tokens between two looks at what others do
};

/// Finds out which outputs rows can arrive in, and a landing block for the others.
void RowMover::bindOutputs(const DispatchOutputs& outputs) {
  if (request_.cached == nullptr) sourceIndex_ = allocateRows(DataType::int32);
  if (context_.integrity) {
    checksums_ = allocateRows(DataType::int64);
    tags_ = allocateRows(DataType::int64);
  }
  const TensorView* views[kNumColumns] = {};
  views[kRows] = &outputs.x;
  views[kScales] = &outputs.scales;
  views[kTopkIdx] = &outputs.topkIdx;
  views[kTopkWeights] = &outputs.topkWeights;
  views[kSourceIndex] = &sourceIndex_.view;
  views[kChecksum] = &checksums_.view;
  views[kSequenceTag] = &tags_.view;
  std::int64_t all[kNumColumns] = {};
  for (int column = 0; column < kNumColumns; ++column) {
    all[column] = rowBytes(column);
    if (rowBytes(column) == 0 || plan_.numRows == 0) continue;
    OutputColumn& output = outputs_[column];
    output.data = static_cast<std::byte*>(views[column]->data);
    output.rowBytes = writer_.rowBytes(column);
    const auto address =
        context_.arena.locate(output.data, arrayBytes(plan_.numRows, output.rowBytes));
    output.address = address.value_or(ArrayAddress{.access = Access::landing});
  }
  context_.arena.noteOperation(landingMap(plan_.numRows, all).bytes);
  // A single rank writes its rows straight into any memory.
  if (context_.size() > 1) landing_.bind(outputs_, plan_.numRows);
}

/// An array of a number a row.
Tensor RowMover::allocateRows(DataType dtype) {
  const std::size_t bytes = arrayBytes(plan_.numRows, itemSize(dtype));
  const auto block = context_.arena.allocate(bytes);
  Tensor rows;
  rows.owner = block ? block->data : context_.pool.allocate(bytes);
  rows.view = makeView(rows.owner.get(), dtype, {plan_.numRows});
  return rows;
}

const std::vector<Message>& RowMover::publish() {
  const TraceScope scope(context_.trace, "publish");
  std::vector<Message> outgoing;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    DispatchPublish publication;
    publication.firstRow = plan_.firstRowFrom[r];
    // A rank has no more room than its rows take: none, if it was masked when the handle was made.
    publication.capacity = std::min(plan_.numRows, plan_.firstRowFrom[r] + plan_.numRowsFrom[r]);
    told_.push_back(!context_.masked(r));
    publication.ringRows = landing_.ringRows(r);
    for (int column = 0; column < kNumColumns; ++column) {
      if (landing_.used()) {
        publication.columns[column] = landing_.address(column, r);
      } else {
        publication.columns[column] = outputs_[column].address;
      }
    }
    outgoing.push_back(encode(publication));
  }
  return exchangePublications(context_, outgoing, "dispatch");
}

void RowMover::receivePublications(const std::vector<Message>& publications) {
  step_ = landing_.used() ? kTokensPerLook * context_.workers.numThreads()
                          : std::max<std::int64_t>(request_.numTokens, 1);
  for (std::size_t r = 0; r < numRanks(); ++r) {
    // A masked rank has no capacity: nothing is sent there.
    bindTarget(r, publications[r].empty() ? DispatchPublish{} : decodePublish(publications[r], r));
  }
}

void RowMover::bindTarget(std::size_t rank, const DispatchPublish& publication) {
  RowWriter::Target& target = targets_[rank];
  target.rank = static_cast<int>(rank);
  target.firstRow = publication.firstRow;
  target.capacity = publication.capacity;
  target.ringRows = std::max<std::int64_t>(publication.ringRows, 1);
  if (rowsAmong(rank, request_.numTokens) == 0) return;
  for (int column = 0; column < kNumColumns; ++column) {
    if (rowBytes(column) == 0) continue;
    if (target.rank == context_.rank()) {
      target.columns[column] = outputs_[column].data;
      continue;
    }
    const ArrayAddress& address = publication.columns[column];
    target.lands[column] = address.access == Access::landing;
    const std::int64_t rows = target.lands[column] ? target.ringRows : target.capacity;
    target.columns[column] = peerRows(context_, target.rank, address, {0, rows},
                                      writer_.rowBytes(column), elementBytes(column));
    // While one half of a ring is written, the other is on its way out of it.
    if (target.lands[column]) step_ = std::min(step_, std::max<std::int64_t>(rows / 2, 1));
  }
}

void RowMover::sendRows() {
  const TraceScope scope(context_.trace, "send rows");
  for (std::int64_t sent = 0; sent < request_.numTokens;) {
    const std::int64_t end = std::min(sent + step_, request_.numTokens);
    const auto room = [&] {
      landing_.takeArrived();
      return withoutRoom(end).ranks.empty();
    };
    awaitRoom(room, end);
    context_.workers.run(end - sent, kTokensPerPart, [&](std::int64_t from, std::int64_t to) {
      sendTokens(sent + from, sent + to);
    });
    sent = end;
    raisePushed(sent);
  }
  if (request_.numTokens == 0) raisePushed(0);
}

template <typename Room>
void RowMover::awaitRoom(const Room& room, std::int64_t numTokens) {
  if (room()) return;
  const TraceScope scope(context_.trace, "await room");
  context_.transport.wait(room, [&] { return withoutRoom(numTokens); });
}

/// The ranks that have not yet copied out enough rows for those of the tokens before `numTokens`.
Awaited RowMover::withoutRoom(std::int64_t numTokens) const {
  Awaited full{{}, "room for rows"};
  for (std::size_t r = 0; r < numRanks(); ++r) {
    const RowWriter::Target& target = targets_[r];
    const bool lands =
        std::find(std::begin(target.lands), std::end(target.lands), true) != std::end(target.lands);
    if (!lands || context_.masked(r)) continue;
    const std::int64_t taken = std::max<std::int64_t>(context_.raised(kRowsTaken, target.rank), 0);
    if (rowsAmong(r, numTokens) > taken + target.ringRows) full.ranks.push_back(target.rank);
  }
  return full;
}

void RowMover::sendTokens(std::int64_t begin, std::int64_t end) {
  const auto ranks = static_cast<std::int64_t>(numRanks());
  const std::int32_t* heads = request_.routing.plan->head.data();
  for (std::int64_t token = begin; token < end; ++token) {
    std::optional<std::uint64_t> sum;
    for (std::int64_t r = 0; r < ranks; ++r) {
      const std::int32_t head = heads[token * ranks + r];
      // One that was masked on the way may not have taken what lies where this row would.
      if (head < 0 || context_.masked(static_cast<int>(r))) continue;
      if (context_.integrity && r != context_.rank() && !sum) sum = writer_.checksumOf(token);
      writer_.write(targets_[static_cast<std::size_t>(r)], token, head, sum.value_or(0));
    }
  }
}

/// How many rows for a rank are among the first tokens.
std::int64_t RowMover::rowsAmong(std::size_t rank, std::int64_t numTokens) const {
  const RowWriter::Target& target = targets_[rank];
  const std::vector<std::int32_t>& heads = request_.routing.plan->head;
  std::int64_t rows = request_.routing.plan->numRows[rank];
  if (numTokens < request_.numTokens) {
    auto token = static_cast<std::size_t>(numTokens);
    while (token > 0 && heads[(token - 1) * numRanks() + rank] < 0) --token;
    rows = token == 0 ? 0 : heads[(token - 1) * numRanks() + rank] + 1;
  }
  return rowsKept(target.firstRow, rows, target.capacity);
}

/// Tells every rank how many of its rows have been sent.
void RowMover::raisePushed(std::int64_t sentTokens) {
  for (std::size_t r = 0; r < numRanks(); ++r) {
    const int rank = static_cast<int>(r);
    if (rank == context_.rank() || context_.masked(r)) continue;
    context_.raise(kRowsPushed, rank, rowsAmong(r, sentTokens));
  }
}

void RowMover::awaitRows() {
  const TraceScope scope(context_.trace, "await rows");
  const auto missing = [&] { return missingRows(context_, kRowsPushed, numKeptFrom_, "the rows"); };
  context_.transport.wait([&] { return landing_.takeArrived(); }, missing);
  for (std::size_t r = 0; r < numRanks(); ++r) {
    if (context_.masked(r)) forsake(r);
  }
  (landing_.used() ? context_.stats.landedRows : context_.stats.straightRows) +=
      std::min(plan_.numRecv, plan_.numRows);
}

/// Compares the rows of others, in the memory in which the caller finds them, with what was sent.
void RowMover::verifyRows() const {
  const TraceScope scope(context_.trace, "verify rows");
  const RowVerifier verifier(context_, "dispatch");
  const auto* sums = static_cast<const std::uint64_t*>(checksums_.view.data);
  const auto* tags = static_cast<const std::uint64_t*>(tags_.view.data);
  const std::int32_t* tokens = request_.cached != nullptr
                                   ? request_.cached->sourceTokens.data()
                                   : static_cast<const std::int32_t*>(sourceIndex_.view.data);
  for (std::size_t r = 0; r < numRanks(); ++r) {
    const int rank = static_cast<int>(r);
    if (rank == context_.rank() || context_.masked(r)) continue;
    const std::int64_t first = plan_.firstRowFrom[r];
    context_.workers.run(numKeptFrom_[r], kTokensPerPart, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t row = first + from; row < first + to; ++row) {
        // A handle does not know the tokens of a rank that was masked when it was made.
        const bool unknown = request_.cached != nullptr && tokens[row] < 0;
        const auto token = unknown ? static_cast<std::int64_t>(tagToken(tags[row])) : tokens[row];
        verifier.check(rank, token, checksumOf(row), {sums[row], tags[row]});
      }
    });
  }
  verifier.throwIfDamaged();
}

/// Of a row that was received.
std::uint64_t RowMover::checksumOf(std::int64_t row) const {
  std::uint64_t sum = 0;
  for (const int column : {kRows, kScales}) {
    const OutputColumn& output = outputs_[column];
    sum = checksum(output.data + row * rowBytes(column), output.rowBytes, sum);
  }
  if (rowBytes(kTopkIdx) == 0) return sum;
  const bool wide = request_.signature.indexBytes == sizeof(std::int64_t);
  return wide ? addTopk<std::int64_t>(sum, row) : addTopk<std::int32_t>(sum, row);
}

template <typename Index>
std::uint64_t RowMover::addTopk(std::uint64_t sum, std::int64_t row) const {
  const std::int64_t topk = request_.signature.topk;
  const auto* ids = reinterpret_cast<const Index*>(outputs_[kTopkIdx].data) + row * topk;
  const auto* weights = reinterpret_cast<const float*>(outputs_[kTopkWeights].data) + row * topk;
  for (std::int64_t k = 0; k < topk; ++k) sum = addChoice(sum, ids[k], weights[k]);
  return sum;
}

/// Marks the rows of a rank that was masked: they may not have come, or not whole. They are never
/// given out again as long as the rank may write to them.
void RowMover::forsake(std::size_t rank) {
  const auto begin = static_cast<std::size_t>(plan_.firstRowFrom[rank]);
  const auto count = static_cast<std::size_t>(numKeptFrom_[rank]);
  for (int column = 0; column < kNumColumns; ++column) {
    const OutputColumn& output = outputs_[column];
    if (output.data == nullptr || count == 0) continue;
    if (told_[rank] && context_.transport.mayStillWrite(static_cast<int>(rank))) {
      context_.arena.quarantine(output.data);
      if (landing_.used()) context_.arena.abandonLanding();
    }
    const bool index = column == kTopkIdx || column == kSourceIndex;
    std::memset(output.data + begin * output.rowBytes, index ? 0xFF : 0, count * output.rowBytes);
  }
}

/// With num_worst_tokens, rows that nobody sent are told by their indices.
void RowMover::markMissingRows() {
  const std::int64_t received = std::min(plan_.numRecv, plan_.numRows);
  for (const int column : {kTopkIdx, kSourceIndex}) {
    const OutputColumn& output = outputs_[column];
    if (output.data == nullptr) continue;
    std::memset(output.data + received * rowBytes(column), 0xFF,
                static_cast<std::size_t>((plan_.numRows - received) * rowBytes(column)));
  }
  const OutputColumn& weights = outputs_[kTopkWeights];
  if (weights.data != nullptr) {
    std::memset(weights.data + received * rowBytes(kTopkWeights), 0,
                static_cast<std::size_t>((plan_.numRows - received) * rowBytes(kTopkWeights)));
  }
}

Tensor wrap(std::shared_ptr<void> owner, const void* data, DataType dtype, std::int64_t rows,
            std::int64_t columns) {
  return {makeView(data, dtype, {rows, columns}), std::move(owner), false};
}

std::shared_ptr<const HandleState> RowMover::makeHandle() {
  auto state = describeRouting(context_, request_, plan_);
  for (const RowWriter::Target& target : targets_) {
    state->firstRowAt.push_back(target.firstRow);
    state->capacityAt.push_back(target.capacity);
  }
  if (request_.cached != nullptr) return state;

  const auto ranks = static_cast<std::int64_t>(numRanks());
  // Callers may write to what the handle shows; the routing itself stays as it is.
  const auto heads = shared(request_.routing.plan->head);
  state->sendHead = wrap(heads, heads->data(), DataType::int32, request_.numTokens, ranks);
  const auto* inRank = static_cast<const std::uint8_t*>(request_.inputs.isTokenInRank.data);
  auto copy = shared(std::vector<std::uint8_t>(inRank, inRank + request_.numTokens * ranks));
  state->isTokenInRank = wrap(copy, copy->data(), DataType::boolean, request_.numTokens, ranks);
  state->sourceIndex = sourceIndex_;
  if (context_.integrity) {
    const auto* tokens = static_cast<const std::int32_t*>(sourceIndex_.view.data);
    state->sourceTokens.assign(tokens, tokens + plan_.numRows);
  }
  return state;
}

}  // namespace

std::shared_ptr<const HandleState> moveRows(Context& context, const DispatchRequest& request,
                                            const DispatchPlan& plan,
                                            const DispatchOutputs& outputs) {
  return RowMover(context, request, plan, outputs).run();
}

}  // namespace mscclpp_ep::cpu
