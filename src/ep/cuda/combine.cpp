// SPDX-License-Identifier: MIT
#include "cuda/combine.hpp"

#include <span>
#include <vector>

#include "cuda/routing.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cuda {

namespace {

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
        sources_(static_cast<std::size_t>(context.size())) {}

  void run() {
    offerInputs();
    receiveOffers();
    reduce();
  }

 private:
  void offerInputs();
  void stage(std::size_t rows, std::size_t weights);
  void copyToStaging(std::size_t offset, const void* data, std::size_t bytes);
  void receiveOffers();
  void bindSource(std::size_t rank, const CombineEntry& entry);
  int rowAlignment() const;
  void reduce();

  std::int64_t numReceived() const {
    return handle_.plan == nullptr ? handle_.numRows
                                   : std::min(handle_.numRecv(), handle_.numRows);
  }
  const std::byte* input() const { return static_cast<const std::byte*>(request_.inputs.x.data); }
  const std::byte* inputWeights() const {
    return static_cast<const std::byte*>(request_.inputs.topkWeights.data);
  }

  Context& context_;
  const CombineRequest& request_;
  const HandleState& handle_;
  const std::size_t rowBytes_;
  const std::size_t weightBytes_;
  ArrayAddress rowsAddress_;
  ArrayAddress weightsAddress_;
  ArenaBlock block_;  ///< in which inputs are copied for peers
  std::vector<SumSource> sources_;
};

/// Makes this rank's rows readable by the others: in place, or in a block they are copied to.
void RowReducer::offerInputs() {
  const TraceScope scope(context_.trace, "stage rows");
  try {
    if (numReceived() > 0 && context_.size() > 1) {
      const std::size_t rows = arrayBytes(numReceived(), rowBytes_);
      const std::size_t weights = arrayBytes(numReceived(), weightBytes_);
      const auto rowsInPlace = context_.arena.locate(input(), rows);
      const auto weightsInPlace = context_.arena.locate(inputWeights(), weights);
      context_.arena.noteOperation(alignUp(rows, kPage) + alignUp(weights, kPage));
      (rowsInPlace ? context_.stats.pulledRows : context_.stats.stagedRows) += numReceived();
      stage(rowsInPlace ? 0 : rows, weightsInPlace ? 0 : weights);
      if (rowsInPlace) rowsAddress_ = *rowsInPlace;
      if (weightsInPlace) weightsAddress_ = *weightsInPlace;
    }
  } catch (const Error& error) {
    postRefusal(context_, Operation::combine, error.what());
    throw OperationRefused{std::current_exception()};
  }
}

/// Copies what does not lie in the arena to a block that does.
void RowReducer::stage(std::size_t rows, std::size_t weights) {
  if (rows + weights == 0) return;
  const std::size_t behindRows = alignUp(rows, kPage);
  if (auto block = context_.arena.allocate(behindRows + weights)) {
    block_ = std::move(*block);
  } else {
    if (context_.capturing) context_.arena.keepLanding();
    block_ = context_.arena.landing(behindRows + weights);
  }
  context_.keep(block_.data);
  if (rows > 0) {
    copyToStaging(0, input(), rows);
    rowsAddress_ = block_.address;
  }
  if (weights > 0) {
    copyToStaging(behindRows, inputWeights(), weights);
    weightsAddress_ = block_.address;
    weightsAddress_.offset += behindRows;
  }
}

void RowReducer::copyToStaging(std::size_t offset, const void* data, std::size_t bytes) {
  EP_CUDA_TRY(cudaMemcpyAsync(block_.data.get() + offset, data, bytes, cudaMemcpyDeviceToDevice,
                              context_.stream),
              "cannot copy rows for the other ranks");
}

void RowReducer::receiveOffers() {
  CombineEntry entry;
  entry.signature = request_.signature;
  entry.rows = rowsAddress_;
  entry.weights = weightsAddress_;
  const std::vector<Message> outgoing(sources_.size(), encode(entry));
  const auto& entries = exchangeEntries(context_, outgoing);
  for (std::size_t r = 0; r < sources_.size(); ++r) bindSource(r, decode<CombineEntry>(entries[r]));
}

void RowReducer::bindSource(std::size_t rank, const CombineEntry& entry) {
  SumSource& source = sources_[rank];
  source.span = {handle_.firstRowAt[rank], handle_.capacityAt[rank]};
  const bool noRows = source.span.capacity == 0 ||
                      (handle_.plan != nullptr &&
                       rowsKept(source.span.firstRow, handle_.plan->numRows[rank],
                                source.span.capacity) == 0);
  if (noRows) return;
  const int peer = static_cast<int>(rank);
  const bool own = peer == context_.rank();
  const RowRange range{0, source.span.capacity};
  source.rows = own ? input()
                    : peerRows(context_, peer, entry.rows, range, rowBytes_,
                               itemSize(request_.inputs.x.dtype));
  if (weightBytes_ == 0) return;
  source.weights = reinterpret_cast<const float*>(
      own ? inputWeights()
          : peerRows(context_, peer, entry.weights, range, weightBytes_, sizeof(float)));
}

int RowReducer::rowAlignment() const {
  Alignment alignment;
  alignment.add(static_cast<std::int64_t>(rowBytes_));
  alignment.add(request_.outputs.x.data);
  alignment.add(request_.inputs.bias0.data);
  alignment.add(request_.inputs.bias1.data);
  for (const SumSource& source : sources_) alignment.add(source.rows);
  return alignment.value();
}

void RowReducer::reduce() {
  const TraceScope scope(context_.trace, "reduce");
  SumArguments arguments;
  arguments.out = static_cast<std::byte*>(request_.outputs.x.data);
  arguments.dtype = request_.inputs.x.dtype;
  arguments.hidden = request_.signature.hidden;
  arguments.bias0 = static_cast<const std::byte*>(request_.inputs.bias0.data);
  arguments.bias1 = static_cast<const std::byte*>(request_.inputs.bias1.data);
  if (weightBytes_ != 0) {
    arguments.outWeights = static_cast<float*>(request_.outputs.topkWeights.data);
    arguments.topk = request_.signature.topk;
  }
  const DeviceRouting& routing = deviceRouting(handle_.onGpu);
  arguments.head = routing.heads();
  arguments.sources = context_.perRank(sources_);
  if (handle_.plan == nullptr) {
    arguments.firstRows =
        routing.count(CountsMap(context_.size(), routing.numLocalExperts).firstRows());
  }
  arguments.numTokens = handle_.numTokens;
  arguments.numRanks = context_.size();
  arguments.rowAlignment = rowAlignment();
  arguments.order = context_.order;
  sumRows(arguments, context_.numSms, context_.stream);
}

}  // namespace

void combineRows(Context& context, const CombineRequest& request) {
  RowReducer(context, request).run();
}

}  // namespace mscclpp_ep::cuda
