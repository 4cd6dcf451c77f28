// SPDX-License-Identifier: MIT
#include "cpu/dispatch.hpp"

#include <algorithm>
#include <cstring>

#include "cpu/columns.hpp"
#include "cpu/rounds.hpp"

namespace mscclpp_ep::cpu {

namespace {

// Rows that land are copied out soon after they were written, while they are in some cache. With
// fewer bytes a step the exchange of progress words costs more than that gains.
constexpr std::size_t kLandingStepBytes = std::size_t{256} << 10;
constexpr std::int64_t kTokensPerPart = 16;

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
        writer_(request, context.kernels),
        targets_(static_cast<std::size_t>(context.size())),
        copiedOut_(static_cast<std::size_t>(context.size())) {
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
    markMissingRows();
    return makeHandle();
  }

 private:
  struct Output {
    std::byte* data = nullptr;
    ArrayAddress address;
    const std::byte* landing = nullptr;  ///< where its rows arrive, if not in place
  };

  void bindOutputs(const DispatchOutputs& outputs);
  void bindLanding();
  const std::vector<Message>& publish();
  void receivePublications(const std::vector<Message>& publications);
  void sendRows();
  void sendTokens(std::int64_t begin, std::int64_t end);
  void raisePushed(std::int64_t sentTokens);
  bool copyOutArrived();
  void copyOut(int from, std::int64_t begin, std::int64_t end);
  void awaitRows();
  void markMissingRows();
  std::shared_ptr<const HandleState> makeHandle();

  std::size_t numRanks() const { return targets_.size(); }
  std::int64_t rowBytes(int column) const {
    return static_cast<std::int64_t>(writer_.rowBytes(column));
  }
  std::int64_t rowsKeptFrom(std::size_t rank) const {
    return rowsKept(plan_.firstRowFrom[rank], plan_.numRowsFrom[rank], plan_.numRows);
  }
  std::int64_t rowsKeptAt(const RowWriter::Target& target) const {
    return rowsKept(target.firstRow, request_.plan->numRows[static_cast<std::size_t>(target.rank)],
                    target.capacity);
  }

  Context& context_;
  const DispatchRequest& request_;
  const DispatchPlan& plan_;
  const RowWriter writer_;
  Output outputs_[kNumColumns];
  Tensor sourceIndex_;
  bool landed_ = false;    ///< some output of this rank is copied from the landing block
  bool anyLands_ = false;  ///< some peer copies out what this rank sends
  std::vector<RowWriter::Target> targets_;
  std::vector<std::int64_t> copiedOut_;  ///< [R] rows from each rank
};

/// Finds out which outputs rows can arrive in, and a landing block for the others.
void RowMover::bindOutputs(const DispatchOutputs& outputs) {
  if (request_.cached == nullptr) {
    const std::size_t bytes = arrayBytes(plan_.numRows, sizeof(std::int32_t));
    const auto block = context_.arena.allocate(bytes);
    sourceIndex_.owner = block ? block->data : context_.pool.allocate(bytes);
    sourceIndex_.view = makeView(sourceIndex_.owner.get(), DataType::int32, {plan_.numRows});
  }
  const TensorView* views[kNumColumns] = {};
  views[kRows] = &outputs.x;
  views[kScales] = &outputs.scales;
  views[kTopkIdx] = &outputs.topkIdx;
  views[kTopkWeights] = &outputs.topkWeights;
  views[kSourceIndex] = &sourceIndex_.view;
  for (int column = 0; column < kNumColumns; ++column) {
    if (rowBytes(column) == 0 || plan_.numRows == 0) continue;
    Output& output = outputs_[column];
    output.data = static_cast<std::byte*>(views[column]->data);
    const std::size_t bytes = arrayBytes(plan_.numRows, writer_.rowBytes(column));
    const auto address = context_.arena.locate(output.data, bytes);
    output.address = address.value_or(ArrayAddress{.access = Access::landing});
    landed_ = landed_ || !address;
  }
  // A single rank writes its rows straight into any memory.
  if (context_.size() == 1) landed_ = false;
  std::int64_t all[kNumColumns] = {};
  for (int column = 0; column < kNumColumns; ++column) all[column] = rowBytes(column);
  context_.arena.noteOperation(landingMap(plan_.numRows, all).bytes);
  if (landed_) bindLanding();
}

void RowMover::bindLanding() {
  std::int64_t bytes[kNumColumns] = {};
  for (int column = 0; column < kNumColumns; ++column) {
    if (outputs_[column].address.access == Access::landing) bytes[column] = rowBytes(column);
  }
  const LandingMap map = landingMap(plan_.numRows, bytes);
  const ArenaBlock block = context_.arena.landing(map.bytes);
  for (int column = 0; column < kNumColumns; ++column) {
    if (bytes[column] == 0) continue;
    outputs_[column].address.segment = block.address.segment;
    outputs_[column].address.offset = block.address.offset + map.offset[column];
    outputs_[column].landing = block.data.get() + map.offset[column];
  }
}

const std::vector<Message>& RowMover::publish() {
  std::vector<Message> outgoing;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    DispatchPublish publication;
    publication.firstRow = plan_.firstRowFrom[r];
    publication.capacity = plan_.numRows;
    for (int column = 0; column < kNumColumns; ++column) {
      publication.columns[column] = outputs_[column].address;
    }
    outgoing.push_back(encode(publication));
  }
  return context_.mailbox.exchange(context_.epoch, static_cast<std::uint32_t>(Round::publish),
                                   outgoing, "where rows go");
}

void RowMover::receivePublications(const std::vector<Message>& publications) {
  std::vector<Status> statuses;
  statuses.reserve(publications.size());
  for (const Message& message : publications) statuses.push_back(decode<Status>(message));
  requireAll(statuses, "dispatch");
  for (std::size_t r = 0; r < numRanks(); ++r) {
    const auto publication = decode<DispatchPublish>(publications[r]);
    RowWriter::Target& target = targets_[r];
    target.rank = static_cast<int>(r);
    target.firstRow = publication.firstRow;
    target.capacity = publication.capacity;
    if (rowsKeptAt(target) == 0) continue;
    for (int column = 0; column < kNumColumns; ++column) {
      const ArrayAddress& address = publication.columns[column];
      if (rowBytes(column) == 0) continue;
      if (target.rank == context_.rank()) {
        target.columns[column] = outputs_[column].data;
        continue;
      }
      target.columns[column] = context_.transport.peerMemory(
          target.rank, address.segment, address.offset,
          static_cast<std::size_t>(publication.capacity * rowBytes(column)));
      target.cached[column] = address.access == Access::landing;
      anyLands_ = anyLands_ || target.cached[column];
    }
  }
}

void RowMover::sendRows() {
  std::int64_t step = std::max<std::int64_t>(request_.numTokens, 1);
  if (anyLands_ || landed_) {
    const auto bytes = std::max<std::size_t>(writer_.rowBytes(kRows), 1);
    step = std::max<std::int64_t>(static_cast<std::int64_t>(kLandingStepBytes / bytes), 1) *
           context_.workers.numThreads();
  }
  std::int64_t sent = 0;
  while (sent < request_.numTokens) {
    const std::int64_t end = std::min(sent + step, request_.numTokens);
    context_.workers.run(end - sent, kTokensPerPart, [&](std::int64_t from, std::int64_t to) {
      sendTokens(sent + from, sent + to);
    });
    sent = end;
    raisePushed(sent);
    copyOutArrived();
  }
  if (request_.numTokens == 0) raisePushed(0);
}

void RowMover::sendTokens(std::int64_t begin, std::int64_t end) {
  const auto ranks = static_cast<std::int64_t>(numRanks());
  const std::int32_t* heads = request_.plan->head.data();
  for (std::int64_t token = begin; token < end; ++token) {
    for (std::int64_t r = 0; r < ranks; ++r) {
      const std::int32_t head = heads[token * ranks + r];
      if (head >= 0) writer_.write(targets_[static_cast<std::size_t>(r)], token, head);
    }
  }
}

/// Tells every rank how many of its rows are among the first `sentTokens` tokens.
void RowMover::raisePushed(std::int64_t sentTokens) {
  const auto ranks = static_cast<std::int64_t>(numRanks());
  for (std::int64_t r = 0; r < ranks; ++r) {
    const RowWriter::Target& target = targets_[static_cast<std::size_t>(r)];
    std::int64_t rows = request_.plan->numRows[static_cast<std::size_t>(r)];
    if (sentTokens < request_.numTokens) {
      std::int64_t token = sentTokens;
      while (token > 0 &&
             request_.plan->head[static_cast<std::size_t>((token - 1) * ranks + r)] < 0)
        --token;
      rows = token == 0
                 ? 0
                 : request_.plan->head[static_cast<std::size_t>((token - 1) * ranks + r)] + 1;
    }
    if (target.rank != context_.rank()) {
      context_.raise(kRowsPushed, target.rank, rowsKept(target.firstRow, rows, target.capacity));
    }
  }
}

/// Copies out the rows that have landed. True when every row has come.
bool RowMover::copyOutArrived() {
  bool all = true;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    if (static_cast<int>(r) == context_.rank()) continue;
    const std::int64_t arrived = context_.raised(kRowsPushed, static_cast<int>(r));
    all = all && arrived >= rowsKeptFrom(r);
    if (!landed_ || arrived <= copiedOut_[r]) continue;
    copyOut(static_cast<int>(r), copiedOut_[r], std::min(arrived, rowsKeptFrom(r)));
    copiedOut_[r] = arrived;
  }
  return all;
}

void RowMover::copyOut(int from, std::int64_t begin, std::int64_t end) {
  const std::int64_t first = plan_.firstRowFrom[static_cast<std::size_t>(from)];
  context_.workers.run(
      end - begin, kTokensPerPart, [&](std::int64_t partBegin, std::int64_t partEnd) {
        for (int column = 0; column < kNumColumns; ++column) {
          const Output& output = outputs_[column];
          if (output.landing == nullptr) continue;
          const std::int64_t offset = (first + begin + partBegin) * rowBytes(column);
          const auto bytes = static_cast<std::size_t>((partEnd - partBegin) * rowBytes(column));
          context_.kernels.streamCopy(output.data + offset, output.landing + offset, bytes);
        }
      });
}

void RowMover::awaitRows() {
  const auto missing = [&] {
    Awaited late{{}, "the rows"};
    for (std::size_t r = 0; r < numRanks(); ++r) {
      const int rank = static_cast<int>(r);
      const bool arrived = context_.raised(kRowsPushed, rank) >= rowsKeptFrom(r);
      if (rank != context_.rank() && !arrived) late.ranks.push_back(rank);
    }
    return late;
  };
  context_.transport.wait([&] { return copyOutArrived(); }, missing);
  (landed_ ? context_.stats.landedRows : context_.stats.straightRows) +=
      std::min(plan_.numRecv, plan_.numRows);
}

/// With num_worst_tokens, rows that nobody sent are told by their indices.
void RowMover::markMissingRows() {
  const std::int64_t received = std::min(plan_.numRecv, plan_.numRows);
  for (const int column : {kTopkIdx, kSourceIndex}) {
    const Output& output = outputs_[column];
    if (output.data == nullptr) continue;
    std::memset(output.data + received * rowBytes(column), 0xFF,
                static_cast<std::size_t>((plan_.numRows - received) * rowBytes(column)));
  }
  const Output& weights = outputs_[kTopkWeights];
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
  auto state = request_.cached != nullptr ? std::make_shared<HandleState>(*request_.cached)
                                          : std::make_shared<HandleState>();
  state->epoch = context_.epoch;
  state->firstRowAt.clear();
  state->capacityAt.clear();
  for (const RowWriter::Target& target : targets_) {
    state->firstRowAt.push_back(target.firstRow);
    state->capacityAt.push_back(target.capacity);
  }
  if (request_.cached != nullptr) return state;

  const auto ranks = static_cast<std::int64_t>(numRanks());
  state->bufferId = context_.bufferId;
  state->layout = request_.options.layout;
  state->numTokens = request_.numTokens;
  state->hidden = request_.signature.hidden;
  state->topk = request_.signature.topk;
  state->numExperts = request_.signature.numExperts;
  state->opaqueRows = isOpaque(request_.inputs.x.dtype);
  state->plan = request_.plan;
  // Callers may write to what the handle shows; the routing itself stays as it is.
  const auto heads = shared(request_.plan->head);
  state->sendHead = wrap(heads, heads->data(), DataType::int32, request_.numTokens, ranks);
  const auto* inRank = static_cast<const std::uint8_t*>(request_.inputs.isTokenInRank.data);
  auto copy = shared(std::vector<std::uint8_t>(inRank, inRank + request_.numTokens * ranks));
  state->isTokenInRank = wrap(copy, copy->data(), DataType::boolean, request_.numTokens, ranks);
  state->numRows = plan_.numRows;
  state->firstRowFrom = plan_.firstRowFrom;
  state->numRowsFrom = plan_.numRowsFrom;
  state->perExpert = plan_.perExpert;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    state->rankPrefixSum.push_back(
        static_cast<std::int32_t>(plan_.firstRowFrom[r] + plan_.numRowsFrom[r]));
  }
  state->sourceIndex = sourceIndex_;
  return state;
}

}  // namespace

std::shared_ptr<const HandleState> moveRows(Context& context, const DispatchRequest& request,
                                            const DispatchPlan& plan,
                                            const DispatchOutputs& outputs) {
  return RowMover(context, request, plan, outputs).run();
}

void abandonRows(Context& context, Verdict verdict, std::string_view why) {
  const std::vector<Message> outgoing(static_cast<std::size_t>(context.size()),
                                      encode(refusal(verdict, why)));
  context.mailbox.post(context.epoch, static_cast<std::uint32_t>(Round::publish), outgoing,
                       "room for a message");
}

}  // namespace mscclpp_ep::cpu
