// SPDX-License-Identifier: MIT
#include "cuda/dispatch.hpp"

#include <span>
#include <vector>

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
        numKeptFrom_(plan.numKeptFrom()),
        targets_(numKeptFrom_.size()) {
    describeColumns();
    try {
      bindOutputs(outputs);
      head_ = context_.pool.upload(std::span<const std::int32_t>(request.plan->head),
                                   context.stream.get());
    } catch (const Error& error) {
      abandonRows(context, Verdict::noRoom, error.what());
      throw OperationRefused{std::current_exception()};
    }
  }

  std::shared_ptr<const HandleState> run() {
    bindTargets(publish());
    sendRows();
    awaitRows();
    copyLanded();
    markMissingRows();
    auto handle = makeHandle();
    context_.stream.synchronize("the dispatch");
    return handle;
  }

 private:
  void describeColumns();
  void bindOutputs(const DispatchOutputs& outputs);
  void bindLanding();
  Tensor allocateRows(DataType dtype);
  Tensor copyOf(const void* data, DataType dtype, std::initializer_list<std::int64_t> shape);
  const std::vector<Message>& publish();
  void bindTargets(const std::vector<Message>& publications);
  void bindTarget(std::size_t rank, const DispatchPublish& publication);
  int rowAlignment() const;
  void sendRows();
  void awaitRows();
  void copyLanded();
  void copyRows(const OutputColumn& output, std::int64_t rowBytes, std::int64_t begin,
                std::int64_t end);
  void markMissingRows();
  void fill(int column, std::int64_t from, int value);
  std::shared_ptr<const HandleState> makeHandle();

  std::size_t numRanks() const { return targets_.size(); }
  std::int64_t numReceived() const { return std::min(plan_.numRecv, plan_.numRows); }

  Context& context_;
  const PlacementArrays& placement_;
  const DispatchRequest& request_;
  const DispatchPlan& plan_;
  const std::vector<std::int64_t> numKeptFrom_;
  std::int64_t rowBytes_[kNumColumns] = {};  ///< 0: this dispatch has no such array
  OutputColumn outputs_[kNumColumns];
  Tensor sourceIndex_;
  ArenaBlock landing_;
  std::vector<PushTarget> targets_;
  std::shared_ptr<std::byte> head_;
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
}

/// Finds out which outputs rows can arrive in, and a landing block for the others.
void RowMover::bindOutputs(const DispatchOutputs& outputs) {
  if (request_.cached == nullptr) sourceIndex_ = allocateRows(DataType::int32);
  const TensorView* views[kNumColumns] = {};
  views[kRows] = &outputs.x;
  views[kScales] = &outputs.scales;
  views[kTopkIdx] = &outputs.topkIdx;
  views[kTopkWeights] = &outputs.topkWeights;
  views[kSourceIndex] = &sourceIndex_.view;
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
  rows.owner = block ? block->data : context_.pool.allocate(bytes);
  rows.view = makeView(rows.owner.get(), dtype, {plan_.numRows}, context_.onDevice());
  return rows;
}

Tensor RowMover::copyOf(const void* data, DataType dtype,
                        std::initializer_list<std::int64_t> shape) {
  Tensor copy;
  copy.view = makeView(nullptr, dtype, shape, context_.onDevice());
  const std::size_t bytes = numBytes(copy.view);
  copy.owner = context_.pool.allocate(bytes);
  copy.view.data = copy.owner.get();
  EP_CUDA_TRY(
      cudaMemcpyAsync(copy.view.data, data, bytes, cudaMemcpyDeviceToDevice, context_.stream.get()),
      "cannot copy the routing");
  return copy;
}

const std::vector<Message>& RowMover::publish() {
  const TraceScope scope(context_.trace, "publish");
  std::vector<Message> outgoing;
  for (std::size_t r = 0; r < numRanks(); ++r) {
    DispatchPublish publication;
    publication.firstRow = plan_.firstRowFrom[r];
    publication.capacity = std::min(plan_.numRows, plan_.firstRowFrom[r] + plan_.numRowsFrom[r]);
    for (int column = 0; column < kNumColumns; ++column) {
      publication.columns[column] = outputs_[column].address;
    }
    outgoing.push_back(encode(publication));
  }
  return context_.mailbox.exchange(context_.epoch, static_cast<std::uint32_t>(Round::publish),
                                   outgoing, "where rows go");
}

void RowMover::bindTargets(const std::vector<Message>& publications) {
  std::vector<Status> statuses;
  statuses.reserve(publications.size());
  for (const Message& message : publications) statuses.push_back(decode<Status>(message));
  requireAll(statuses, "dispatch");
  for (std::size_t r = 0; r < numRanks(); ++r) {
    bindTarget(r, decodePublish(publications[r], r));
  }
}

void RowMover::bindTarget(std::size_t rank, const DispatchPublish& publication) {
  PushTarget& target = targets_[rank];
  target.firstRow = publication.firstRow;
  target.capacity = publication.capacity;
  if (rowsKept(target.firstRow, request_.plan->numRows[rank], target.capacity) == 0) return;
  const int peer = static_cast<int>(rank);
  for (int column = 0; column < kNumColumns; ++column) {
    if (rowBytes_[column] == 0) continue;
    // Own rows go to the output itself, also where those of others land elsewhere.
    target.columns[column] =
        peer == context_.rank()
            ? outputs_[column].data
            : peerRows(context_, peer, publication.columns[column], {0, target.capacity},
                       static_cast<std::size_t>(rowBytes_[column]), 1);
  }
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

TopkArrays topkOf(const DispatchInputs& inputs) {
  if (!inputs.topkIdx) return {};
  return {inputs.topkIdx.data, static_cast<const float*>(inputs.topkWeights.data),
          inputs.topkIdx.shape[1], inputs.topkIdx.dtype == DataType::int64};
}

void RowMover::sendRows() {
  const TraceScope scope(context_.trace, "send rows");
  const auto targets =
      context_.pool.upload(std::span<const PushTarget>(targets_), context_.stream.get());
  PushArguments arguments;
  arguments.rows = static_cast<const std::byte*>(request_.inputs.x.data);
  arguments.rowBytes = rowBytes_[kRows];
  arguments.scales = scalesOf(request_.inputs.scales);
  arguments.topk = topkOf(request_.inputs);
  arguments.placement = placement_;
  arguments.head = reinterpret_cast<const std::int32_t*>(head_.get());
  arguments.targets = reinterpret_cast<const PushTarget*>(targets.get());
  arguments.numTokens = request_.numTokens;
  arguments.numRanks = context_.size();
  arguments.rowAlignment = rowAlignment();
  pushRows(arguments, context_.numSms, context_.stream.get());
  // A rank that is told of its rows finds them in its memory.
  context_.stream.synchronize("the sending of rows");
  for (std::size_t r = 0; r < numRanks(); ++r) {
    const int peer = static_cast<int>(r);
    if (peer == context_.rank()) continue;
    const PushTarget& target = targets_[r];
    context_.raise(kRowsPushed, peer,
                   rowsKept(target.firstRow, request_.plan->numRows[r], target.capacity));
  }
}

void RowMover::awaitRows() {
  const TraceScope scope(context_.trace, "await rows");
  const auto missing = [&] { return missingRows(context_, kRowsPushed, numKeptFrom_, "the rows"); };
  context_.transport.wait([&] { return missing().ranks.empty(); }, missing);
  (landing_.data != nullptr ? context_.stats.landedRows : context_.stats.straightRows) +=
      numReceived();
}

/// Moves what has landed to the outputs; own rows are there already.
void RowMover::copyLanded() {
  const auto self = static_cast<std::size_t>(context_.rank());
  const std::int64_t own = plan_.firstRowFrom[self];
  for (int column = 0; column < kNumColumns; ++column) {
    if (outputs_[column].landing == nullptr) continue;
    copyRows(outputs_[column], rowBytes_[column], 0, std::min(own, numReceived()));
    copyRows(outputs_[column], rowBytes_[column], own + numKeptFrom_[self], numReceived());
  }
}

void RowMover::copyRows(const OutputColumn& output, std::int64_t rowBytes, std::int64_t begin,
                        std::int64_t end) {
  if (begin >= end) return;
  EP_CUDA_TRY(cudaMemcpyAsync(output.data + begin * rowBytes, output.landing + begin * rowBytes,
                              static_cast<std::size_t>((end - begin) * rowBytes),
                              cudaMemcpyDeviceToDevice, context_.stream.get()),
              "cannot copy rows to the output");
}

/// With num_worst_tokens, rows that nobody sent are told by their indices.
void RowMover::markMissingRows() {
  fill(kTopkIdx, numReceived(), 0xFF);
  fill(kSourceIndex, numReceived(), 0xFF);
  fill(kTopkWeights, numReceived(), 0);
}

void RowMover::fill(int column, std::int64_t from, int value) {
  const OutputColumn& output = outputs_[column];
  if (output.data == nullptr || from >= plan_.numRows) return;
  EP_CUDA_TRY(cudaMemsetAsync(output.data + from * rowBytes_[column], value,
                              static_cast<std::size_t>((plan_.numRows - from) * rowBytes_[column]),
                              context_.stream.get()),
              "cannot mark rows that did not come");
}

std::shared_ptr<const HandleState> RowMover::makeHandle() {
  auto state = describeRouting(context_, request_, plan_);
  for (const PushTarget& target : targets_) {
    state->firstRowAt.push_back(target.firstRow);
    state->capacityAt.push_back(target.capacity);
  }
  if (request_.cached != nullptr) return state;
  state->headOnGpu = head_;
  const std::int64_t ranks = context_.size();
  // Callers may write to what the handle shows; the routing itself stays as it is.
  state->sendHead = copyOf(head_.get(), DataType::int32, {request_.numTokens, ranks});
  state->isTokenInRank =
      copyOf(request_.inputs.isTokenInRank.data, DataType::boolean, {request_.numTokens, ranks});
  state->sourceIndex = sourceIndex_;
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
