// SPDX-License-Identifier: MIT
#include "cuda/dispatch.hpp"

#include <span>
#include <vector>

#include "cuda/integrity.hpp"
#include "cuda/routing.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cuda {

namespace {

/// An array that a dispatch fills, at the receiver.
struct OutputColumn {
  std::byte* data = nullptr;     ///< null: this dispatch has no such array
  std::byte* landing = nullptr;  ///< where rows of others arrive, if that is not `data`
  ArrayAddress address;          ///< of what peers write to
};

/// The second half of a dispatch, on one rank.
class RowMover {
 public:
  RowMover(Context& context, const PlacementArrays& placement, const DispatchRequest& request,
           const DispatchPlan& plan, const DispatchOutputs& outputs)
      : context_(context),
        placement_(placement),
        request_(request),
        plan_(plan),
        routing_(deviceRouting(request.routing.onGpu)),
        map_(context.size(), routing_.numLocalExperts),
        targets_(static_cast<std::size_t>(context.size())) {
    describeColumns();
    try {
      bindOutputs(outputs);
      if (exchangesCounts()) incoming_ = takeIncoming();
      context.reserveTables(3);
    } catch (const Error& error) {
      abandonRows(context, Verdict::noRoom, error.what());
      throw OperationRefused{std::current_exception()};
    }
  }

  std::shared_ptr<const HandleState> run() {
    bindTargets(publish());
    context_.keep(request_.routing.onGpu);
    // From here on nothing may wait for the GPU: the kernels of other ranks wait for this one's.
    context_.meetRanks();
    if (exchangesCounts()) exchangeCountsOnGpu();
    const PushArguments sent = describeSending();
    if (context_.mayLose()) enter();
    sendRows(sent);
    if (checks()) sealSentRows(sent, context_.numSms, context_.stream);
    copyLanded();
    if (context_.mayLose()) blankLost();
    if (checks()) verifyRows(sent.poison);
    if (context_.mayLose()) noteWritten();
    return makeHandle();
  }

 private:
  void describeColumns();
  void bindOutputs(const DispatchOutputs& outputs);
  void bindLanding();
  Tensor allocateRows(DataType dtype);
  const ArenaBlock& takeIncoming();
  const std::vector<Message>& publish();
  void bindTargets(const std::vector<Message>& publications);
  void bindTarget(std::size_t rank, const DispatchPublish& publication);
  std::byte* ownColumn(const OutputColumn& output) const;
  void bindOutgoing(std::size_t rank, const DispatchPublish& publication);
  int rowAlignment() const;
  void exchangeCountsOnGpu();
  void markMissing();
  PushArguments describeSending();
  void enter();
  void blankLost();
  void noteWritten();
  void sendRows(const PushArguments& sent);
  void copyLanded();
  void copyRows(const OutputColumn& output, std::int64_t rowBytes, std::int64_t begin,
                std::int64_t end);
  void writeCounts();
  void verifyRows(const Poison& results);
  std::shared_ptr<const HandleState> makeHandle();

  /// Whether the counts of this dispatch are not on the host, and have not been exchanged before.
  bool exchangesCounts() const { return request_.cached == nullptr && !request_.countsOnHost(); }
  /// Whether they are on the host, and not on the GPU yet.
  bool bringsCounts() const { return request_.cached == nullptr && request_.countsOnHost(); }
  /// Whether rows carry what they are checked by.
  bool checks() const { return context_.integrity && context_.size() > 1; }
  std::size_t numRanks() const { return targets_.size(); }
  std::int64_t numReceived() const {
    return request_.countsOnHost() ? std::min(plan_.numRecv, plan_.numRows) : plan_.numRows;
  }

  Context& context_;
  const PlacementArrays& placement_;
  const DispatchRequest& request_;
  const DispatchPlan& plan_;
  const DeviceRouting& routing_;
  const CountsMap map_;
  std::int64_t rowBytes_[kNumColumns] = {};  ///< 0: this dispatch has no such array
  OutputColumn outputs_[kNumColumns];
  Tensor sourceIndex_;
  Tensor checksums_;
  Tensor tags_;
  std::shared_ptr<void> sourceTokens_;  ///< [N] what sourceIndex_ is, which callers may write to
  ArenaBlock landing_;
  ArenaBlock incoming_;  ///< packets of counts
  std::vector<PushTarget> targets_;
  std::vector<std::uint64_t*> outgoing_;  ///< likewise, at each rank
};

std::int64_t bytesPerToken(const TensorView& tensor) {
  return tensor ? tensor.shape[1] * static_cast<std::int64_t>(itemSize(tensor.dtype)) : 0;
}

void RowMover::describeColumns() {
  rowBytes_[kRows] = bytesPerToken(request_.inputs.x);
  rowBytes_[kScales] = bytesPerToken(request_.inputs.scales);
  rowBytes_[kTopkIdx] = bytesPerToken(request_.inputs.topkIdx);
  rowBytes_[kTopkWeights] = bytesPerToken(request_.inputs.topkWeights);
  if (request_.cached == nullptr) rowBytes_[kSourceIndex] = sizeof(std::int32_t);
  if (checks()) rowBytes_[kChecksum] = rowBytes_[kSequenceTag] = sizeof(std::uint64_t);
}

/// Finds out which outputs rows can arrive in, and a landing block for the others.
void RowMover::bindOutputs(const DispatchOutputs& outputs) {
  if (request_.cached == nullptr) sourceIndex_ = allocateRows(DataType::int32);
  if (checks()) {
    checksums_ = allocateRows(DataType::int64);
    tags_ = allocateRows(DataType::int64);
    sourceTokens_ = request_.cached != nullptr
                        ? context_.keep(request_.cached->sourceTokensOnGpu)
                        : context_.take(arrayBytes(plan_.numRows, sizeof(std::int32_t)));
  }
  const TensorView* views[kNumColumns] = {};
  views[kRows] = &outputs.x;
  views[kScales] = &outputs.scales;
  views[kTopkIdx] = &outputs.topkIdx;
  views[kTopkWeights] = &outputs.topkWeights;
  views[kSourceIndex] = &sourceIndex_.view;
  views[kChecksum] = &checksums_.view;
  views[kSequenceTag] = &tags_.view;
  for (int column = 0; column < kNumColumns; ++column) {
    if (rowBytes_[column] == 0 || plan_.numRows == 0) continue;
    OutputColumn& output = outputs_[column];
    output.data = static_cast<std::byte*>(views[column]->data);
    const auto address = context_.arena.locate(
        output.data, arrayBytes(plan_.numRows, static_cast<std::size_t>(rowBytes_[column])));
    output.address = address.value_or(ArrayAddress{});
  }
  context_.arena.noteOperation(landingMap(plan_.numRows, rowBytes_).bytes);
  // A single rank writes its rows straight into any memory.
  if (context_.size() > 1) bindLanding();
}

void RowMover::bindLanding() {
  std::int64_t missing[kNumColumns] = {};
  for (int column = 0; column < kNumColumns; ++column) {
    const OutputColumn& output = outputs_[column];
    const bool lands = output.data != nullptr && output.address.access == Access::none;
    if (lands) missing[column] = rowBytes_[column];
  }
  const LandingMap map = landingMap(plan_.numRows, missing);
  if (map.bytes == 0) return;
  context_.settleLanding();
  landing_ = context_.arena.landing(map.bytes);
  for (int column = 0; column < kNumColumns; ++column) {
    if (missing[column] == 0) continue;
    OutputColumn& output = outputs_[column];
    output.landing = landing_.data.get() + map.offset[column];
    output.address = landing_.address;
    output.address.offset += map.offset[column];
  }
}

/// An array of a number a row.
Tensor RowMover::allocateRows(DataType dtype) {
  const std::size_t bytes = arrayBytes(plan_.numRows, itemSize(dtype));
  const auto block = context_.arena.allocate(bytes);
  Tensor rows;
  rows.owner = block ? context_.keep(block->data) : context_.take(bytes);
  rows.view = makeView(rows.owner.get(), dtype, {plan_.numRows}, context_.onDevice());
  return rows;
}

const ArenaBlock& RowMover::takeIncoming() {
  return context_.packets.reserve(
      context_.arena,
      arrayBytes(context_.size() * (1 + routing_.numLocalExperts), sizeof(std::uint64_t)),
      context_.stream, context_.capturing);
}

const std::vector<Message>& RowMover::publish() {
  const TraceScope scope(context_.trace, "publish");
  std::vector<Message> outgoing;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    DispatchPublish publication;
    publication.firstRow = plan_.firstRowFrom[r];
    publication.capacity = plan_.numRows;
    if (request_.countsOnHost()) {
      publication.capacity = std::min(plan_.numRows, plan_.firstRowFrom[r] + plan_.numRowsFrom[r]);
    }
    publication.counts = incoming_.address;
    for (int column = 0; column < kNumColumns; ++column) {
      publication.columns[column] = outputs_[column].address;
    }
    outgoing.push_back(encode(publication));
  }
  return exchangePublications(context_, outgoing, "dispatch", [&] {
    if (bringsCounts()) writeCounts();
  });
}

void RowMover::bindTargets(const std::vector<Message>& publications) {
  for (std::size_t r = 0; r < numRanks(); ++r) {
    // A masked rank has no capacity: nothing is sent there.
    bindTarget(r, publications[r].empty() ? DispatchPublish{} : decodePublish(publications[r], r));
  }
}

void RowMover::bindTarget(std::size_t rank, const DispatchPublish& publication) {
  if (exchangesCounts()) bindOutgoing(rank, publication);
  PushTarget& target = targets_[rank];
  target.span = {publication.firstRow, publication.capacity};
  const bool noRows = target.span.capacity == 0 ||
                      (request_.countsOnHost() &&
                       rowsKept(target.span.firstRow, request_.routing.plan->numRows[rank],
                                target.span.capacity) == 0);
  if (noRows) return;
  const int peer = static_cast<int>(rank);
  for (int column = 0; column < kNumColumns; ++column) {
    if (rowBytes_[column] == 0) continue;
    target.columns[column] =
        peer == context_.rank()
            ? ownColumn(outputs_[column])
            : peerRows(context_, peer, publication.columns[column], {0, target.span.capacity},
                       static_cast<std::size_t>(rowBytes_[column]), 1);
  }
}

/// Own rows go to the output itself, also where those of others land elsewhere, if it is known
/// which of the rows that landed are to be copied.
std::byte* RowMover::ownColumn(const OutputColumn& output) const {
  return output.landing != nullptr && !request_.countsOnHost() ? output.landing : output.data;
}

void RowMover::bindOutgoing(std::size_t rank, const DispatchPublish& publication) {
  const int peer = static_cast<int>(rank);
  if (context_.masked(peer)) return outgoing_.push_back(nullptr);
  const std::int64_t experts = request_.placement->numLocal(peer);
  const RowRange mine{context_.rank() * (1 + experts), 1 + experts};
  outgoing_.push_back(reinterpret_cast<std::uint64_t*>(
      peer == context_.rank()
          ? incoming_.data.get() + static_cast<std::size_t>(mine.first) * sizeof(std::uint64_t)
          : peerRows(context_, peer, publication.counts, mine, sizeof(std::uint64_t),
                     sizeof(std::uint64_t))));
}

/// Of the rows themselves, at their source and wherever they go.
int RowMover::rowAlignment() const {
  Alignment alignment;
  alignment.add(request_.inputs.x.data);
  alignment.add(rowBytes_[kRows]);
  for (const PushTarget& target : targets_) alignment.add(target.columns[kRows]);
  return alignment.value();
}

ScaleArray scalesOf(const TensorView& scales) {
  if (!scales) return {};
  const auto element = static_cast<std::int64_t>(itemSize(scales.dtype));
  return {static_cast<const std::byte*>(scales.data), scales.shape[1], scales.strides[0] * element,
          scales.strides[1] * element, element};
}

/// The ranks' kernels tell each other how many rows go where; with room that is not needed, rows
/// that nobody sends are told by their indices.
void RowMover::exchangeCountsOnGpu() {
  ExchangeArguments arguments;
  arguments.sent = routing_.count(map_.sent());
  arguments.perExpert = static_cast<const std::int32_t*>(request_.inputs.numTokensPerExpert.data);
  arguments.placement = placement_;
  arguments.numLocalExperts = routing_.numLocalExperts;
  arguments.outgoing = context_.perRank(outgoing_);
  arguments.incoming = reinterpret_cast<std::uint64_t*>(incoming_.data.get());
  arguments.numRecv = routing_.count(map_.numRecv());
  arguments.prefixMatrix = routing_.count(map_.prefixMatrix());
  arguments.channelPrefix = routing_.count(map_.channelPrefix());
  arguments.received = routing_.count(map_.perExpert());
  arguments.firstRows = routing_.count(map_.firstRows());
  arguments.firstRowFrom = routing_.count(map_.firstRowFrom());
  arguments.numKeptFrom = routing_.count(map_.numKeptFrom());
  arguments.numRows = plan_.numRows;
  arguments.notice = context_.notice;
  arguments.order = context_.order;
  exchangeCounts(arguments, context_.stream);
}

void RowMover::markMissing() {
  MarkArguments arguments;
  arguments.numRecv = routing_.count(map_.numRecv());
  arguments.numRows = plan_.numRows;
  arguments.topkIdx = outputs_[kTopkIdx].data;
  arguments.idBytes = rowBytes_[kTopkIdx];
  arguments.topkWeights = outputs_[kTopkWeights].data;
  arguments.weightBytes = rowBytes_[kTopkWeights];
  arguments.sourceIndex = reinterpret_cast<std::int32_t*>(outputs_[kSourceIndex].data);
  markMissingRows(arguments, context_.stream);
}

PushArguments RowMover::describeSending() {
  PushArguments arguments;
  arguments.rows = static_cast<const std::byte*>(request_.inputs.x.data);
  arguments.rowBytes = rowBytes_[kRows];
  arguments.scales = scalesOf(request_.inputs.scales);
  arguments.topk = topkOf(request_.inputs);
  arguments.placement = placement_;
  arguments.head = routing_.head;
  arguments.sent = routing_.count(map_.sent());
  arguments.targets = context_.perRank(targets_);
  if (!request_.countsOnHost()) arguments.firstRows = routing_.count(map_.firstRows());
  if (context_.mayLose()) arguments.firstRows = context_.losses->places().firstRows;
  arguments.numTokens = request_.numTokens;
  arguments.numRanks = context_.size();
  arguments.rowAlignment = rowAlignment();
  if (bringsCounts()) {
    const std::int64_t first = map_.numRecv();
    arguments.hostCounts = {context_.hostCounts + first, routing_.count(first),
                            map_.size() - first};
  }
  int next = 0;
  for (const Column column : {kTopkIdx, kSourceIndex}) {
    // What has landed is copied to the output, also if nothing has.
    for (std::byte* data : {outputs_[column].data, outputs_[column].landing}) {
      arguments.poison.data[next] = data;
      arguments.poison.bytes[next++] = data != nullptr ? plan_.numRows * rowBytes_[column] : 0;
    }
  }
  if (exchangesCounts()) {
    // Those that callers see: blocks that have not given up yet look up the places behind them.
    arguments.poison.counts = routing_.counts;
    arguments.poison.numCounts = map_.firstRows();
  }
  arguments.order = context_.order;
  return arguments;
}

/// Where ranks may be lost, which ones this operation is without is decided before rows are sent.
void RowMover::enter() {
  std::vector<Place> known;
  known.reserve(numRanks());
  for (const PushTarget& target : targets_) {
    known.push_back({static_cast<std::int32_t>(target.span.firstRow), 0});
  }
  EntryArguments arguments;
  arguments.known = context_.perRank(known);
  if (!request_.countsOnHost()) arguments.firstRows = routing_.count(map_.firstRows());
  arguments.places = context_.losses->places();
  arguments.order = context_.order;
  enterOperation(arguments, context_.stream);
}

void RowMover::blankLost() {
  BlankArguments arguments;
  for (int column = 0; column < kNumColumns; ++column) {
    arguments.columns[column] = outputs_[column].data;
    arguments.rowBytes[column] = rowBytes_[column];
  }
  arguments.firstRowFrom = routing_.count(map_.firstRowFrom());
  arguments.numKeptFrom = routing_.count(map_.numKeptFrom());
  arguments.order = context_.order;
  blankLostRows(arguments, context_.numSms, context_.stream);
}

void RowMover::noteWritten() {
  PeerWritten written;
  for (const OutputColumn& output : outputs_) {
    if (output.data != nullptr) written.blocks.push_back(output.data);
  }
  written.landing = landing_.data != nullptr;
  context_.losses->note(std::move(written), context_.stream, context_.capturing);
}

void RowMover::sendRows(const PushArguments& sent) {
  const TraceScope scope(context_.trace, "send rows");
  pushRows(sent, context_.numSms, context_.stream);
  (landing_.data != nullptr ? context_.stats.landedRows : context_.stats.straightRows) +=
      numReceived();
}

/// Moves what has landed to the outputs.
void RowMover::copyLanded() {
  const auto self = static_cast<std::size_t>(context_.rank());
  const bool known = request_.countsOnHost();
  const std::int64_t own = known ? plan_.firstRowFrom[self] : 0;
  const std::int64_t numOwn = known ? plan_.numKeptFrom()[self] : 0;
  for (int column = 0; column < kNumColumns; ++column) {
    if (outputs_[column].landing == nullptr) continue;
    copyRows(outputs_[column], rowBytes_[column], 0, std::min(own, numReceived()));
    copyRows(outputs_[column], rowBytes_[column], own + numOwn, numReceived());
  }
  if (exchangesCounts()) markMissing();
}

void RowMover::copyRows(const OutputColumn& output, std::int64_t rowBytes, std::int64_t begin,
                        std::int64_t end) {
  if (begin >= end) return;
  EP_CUDA_TRY(cudaMemcpyAsync(output.data + begin * rowBytes, output.landing + begin * rowBytes,
                              static_cast<std::size_t>((end - begin) * rowBytes),
                              cudaMemcpyDeviceToDevice, context_.stream),
              "cannot copy rows to the output");
}

/// Those that the host knows, for the handle: but for the places at other ranks, which kernels look
/// up only where the host does not know them, and the counts of no channel, which are 0.
void RowMover::writeCounts() {
  const auto ranks = static_cast<std::size_t>(context_.size());
  const auto self = static_cast<std::size_t>(context_.rank());
  const std::span values(context_.hostCounts, static_cast<std::size_t>(map_.size()));
  std::ranges::fill(values, 0);
  const auto set = [&](std::int64_t at, std::size_t i, std::int64_t value) {
    values[static_cast<std::size_t>(at) + i] = static_cast<std::int32_t>(value);
  };
  set(map_.numRecv(), 0, plan_.numRecv);
  for (std::size_t i = 0; i < ranks * ranks; ++i) set(map_.prefixMatrix(), i, -1);
  for (std::size_t r = 0; r < ranks; ++r) {
    set(map_.prefixMatrix(), r * ranks + self, plan_.firstRowFrom[r] + plan_.numRowsFrom[r]);
    set(map_.firstRowFrom(), r, plan_.firstRowFrom[r]);
    set(map_.numKeptFrom(), r, plan_.numKeptFrom()[r]);
  }
  for (std::size_t e = 0; e < plan_.perExpert.size(); ++e) {
    set(map_.perExpert(), e, plan_.perExpert[e]);
  }
}

/// In the integrity mode, when all rows are where the caller reads them.
void RowMover::verifyRows(const Poison& results) {
  if (request_.cached == nullptr) {
    EP_CUDA_TRY(cudaMemcpyAsync(sourceTokens_.get(), sourceIndex_.view.data,
                                arrayBytes(plan_.numRows, sizeof(std::int32_t)),
                                cudaMemcpyDeviceToDevice, context_.stream),
                "cannot copy the numbers of tokens");
  }
  ReceivedRows received;
  received.rows = outputs_[kRows].data;
  received.rowBytes = rowBytes_[kRows];
  if (request_.inputs.scales) {
    received.scales = outputs_[kScales].data;
    received.scalesPerRow = request_.inputs.scales.shape[1];
    received.scaleBytes = static_cast<std::int64_t>(itemSize(request_.inputs.scales.dtype));
  }
  const TopkArrays topk = topkOf(request_.inputs);
  received.ids = outputs_[kTopkIdx].data;
  received.weights = reinterpret_cast<const float*>(outputs_[kTopkWeights].data);
  received.topk = topk.topk;
  received.wide = topk.wide;
  received.checksums = reinterpret_cast<const std::uint64_t*>(outputs_[kChecksum].data);
  received.tags = reinterpret_cast<const std::uint64_t*>(outputs_[kSequenceTag].data);
  received.sourceTokens = static_cast<const std::int32_t*>(sourceTokens_.get());
  received.firstRowFrom = routing_.count(map_.firstRowFrom());
  received.numKeptFrom = routing_.count(map_.numKeptFrom());
  received.order = context_.order;
  verifyReceivedRows(received, context_.numSms, context_.stream);
  concludeChecks(context_.order, results, context_.stream);
}

std::shared_ptr<const HandleState> RowMover::makeHandle() {
  auto state = describeRouting(context_, request_, plan_);
  for (const PushTarget& target : targets_) {
    state->firstRowAt.push_back(target.span.firstRow);
    state->capacityAt.push_back(target.span.capacity);
  }
  if (request_.cached != nullptr) return state;
  state->sourceTokensOnGpu = sourceTokens_;
  state->sendHead = routing_.shownHead;
  state->isTokenInRank = routing_.shownInRank;
  state->sourceIndex = sourceIndex_;
  state->fields = makeFields(context_, routing_);
  return state;
}

}  // namespace

std::shared_ptr<const HandleState> moveRows(Context& context, const PlacementArrays& placement,
                                            const DispatchRequest& request,
                                            const DispatchPlan& plan,
                                            const DispatchOutputs& outputs) {
  return RowMover(context, placement, request, plan, outputs).run();
}

}  // namespace mscclpp_ep::cuda
