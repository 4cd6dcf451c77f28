// SPDX-License-Identifier: MIT
#include "cuda/combine.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/combine_push.hpp"
#include "cuda/integrity.hpp"
#include "cuda/routing.hpp"
#include "host/exchange_counts.hpp"
#include "host/rounds.hpp"

namespace mscclpp_ep::cuda {

namespace {

/// One combine, on one rank. If all ranks' rows are where peers can read them, each rank reads
/// those of its tokens; if not, each rank pushes its rows to where their tokens' owners sum them.
/// Where ranks may be lost, rows are always pushed: ranks that have lost different ones might not
/// agree on it, and rows of a rank that goes on without this one may change while they are read.
class RowReducer {
 public:
  RowReducer(Context& context, const CombineRequest& request)
      : context_(context),
        request_(request),
        handle_(*request.handle),
        routing_(deviceRouting(request.handle->onGpu)),
        map_(context.size(), routing_.numLocalExperts),
        rowBytes_(static_cast<std::size_t>(request.signature.hidden) *
                  itemSize(request.inputs.x.dtype)),
        weightBytes_(request.inputs.topkWeights
                         ? static_cast<std::size_t>(request.signature.topk) * sizeof(float)
                         : 0),
        sources_(static_cast<std::size_t>(context.size())) {}

  void run() {
    context_.keep(handle_.onGpu);
    reserve();
    const std::vector<CombineEntry> entries = exchangeOffers();
    if (!context_.mayLose() && std::all_of(entries.begin(), entries.end(), isReadable)) {
      pull(entries);
    } else {
      push();
    }
  }

 private:
  static bool isReadable(const CombineEntry& entry) { return entry.rows.access != Access::none; }

  void reserve();
  std::vector<CombineEntry> exchangeOffers();
  CombineEntry offer();
  std::optional<ArrayAddress> offerWeights();
  std::optional<ArrayAddress> offerSeals();
  void describe(SumArguments& sum);
  void bindSpan(std::size_t rank);
  int rowAlignment() const;

  void pull(const std::vector<CombineEntry>& entries);
  void bindReadable(std::size_t rank, const CombineEntry& entry);

  void push();
  void enter(const std::vector<LandingTarget>& targets, PushSumArguments& arguments);
  struct LandingPlan {
    std::vector<std::size_t> rowsAt;  ///< [R] in bytes
    std::vector<std::size_t> weightsAt;
    std::size_t bytes;
  };
  LandingPlan planLandings() const;
  std::vector<CombineLanding> makeLandings();
  std::int64_t numRowsOf(std::size_t source) const;
  LandingTarget bindTarget(std::size_t rank, const CombineLanding& landing) const;

  /// Whether rows carry what they are checked by.
  bool checks() const { return context_.integrity && context_.size() > 1; }
  std::size_t sealBytes() const {
    return checks() ? arrayBytes(numReceived(), sizeof(RowSeal)) : 0;
  }
  void sealRows();
  /// `sealsAt`: where those of each other rank are.
  void verifyRows(const SumArguments& sum, bool landed, const std::vector<ArrayAddress>& sealsAt);

  std::size_t self() const { return static_cast<std::size_t>(context_.rank()); }
  bool countsOnHost() const { return handle_.plan != nullptr; }
  /// Rows of the input that hold something, as far as the host knows.
  std::int64_t numReceived() const {
    return countsOnHost() ? std::min(handle_.numRecv(), handle_.numRows) : handle_.numRows;
  }
  const std::byte* input() const { return static_cast<const std::byte*>(request_.inputs.x.data); }
  const float* inputWeights() const {
    return static_cast<const float*>(request_.inputs.topkWeights.data);
  }

  Context& context_;
  const CombineRequest& request_;
  const HandleState& handle_;
  const DeviceRouting& routing_;
  const CountsMap map_;
  const std::size_t rowBytes_;
  const std::size_t weightBytes_;
  std::vector<SumSource> sources_;
  ArenaBlock landing_;                       ///< for what peers push here, or read
  std::vector<const std::uint64_t*> flags_;  ///< [R] of what others push here
  ArenaBlock seals_;                         ///< of this rank's rows, in the integrity mode
};

void RowReducer::reserve() {
  try {
    context_.reserveTables(5);
  } catch (const Error& error) {
    postRefusal(context_, Operation::combine, error.what());
    throw OperationRefused{std::current_exception()};
  }
}

/// Where this rank's rows can be read, if they can.
CombineEntry RowReducer::offer() {
  CombineEntry entry;
  entry.signature = request_.signature;
  entry.gpuEpoch = context_.gpuEpoch;
  if (context_.mayLose()) return entry;
  if (numReceived() == 0 || context_.size() == 1) {
    // Nobody else reads anything: any address will do.
    entry.rows.access = Access::straight;
    return entry;
  }
  const auto rows = context_.arena.locate(input(), arrayBytes(numReceived(), rowBytes_));
  const auto weights = rows ? offerWeights() : std::nullopt;
  const auto seals = weights ? offerSeals() : std::nullopt;
  if (!seals) return entry;
  entry.rows = *rows;
  entry.weights = *weights;
  entry.seals = *seals;
  return entry;
}

/// Those that peers cannot read are copied to where they can, as they are few bytes.
std::optional<ArrayAddress> RowReducer::offerWeights() {
  const std::size_t bytes = arrayBytes(numReceived(), weightBytes_);
  if (bytes == 0) return ArrayAddress{};
  if (const auto inPlace = context_.arena.locate(inputWeights(), bytes)) return inPlace;
  auto block = context_.arena.allocate(bytes);
  if (!block) return std::nullopt;
  landing_ = std::move(*block);
  context_.keep(landing_.data);
  EP_CUDA_TRY(cudaMemcpyAsync(landing_.data.get(), inputWeights(), bytes, cudaMemcpyDeviceToDevice,
                              context_.stream),
              "cannot copy weights for the other ranks");
  return landing_.address;
}

/// Memory for what this rank's rows are checked by.
std::optional<ArrayAddress> RowReducer::offerSeals() {
  if (!checks()) return ArrayAddress{};
  auto block = context_.arena.allocate(sealBytes());
  if (!block) return std::nullopt;
  seals_ = std::move(*block);
  context_.keep(seals_.data);
  return seals_.address;
}

std::vector<CombineEntry> RowReducer::exchangeOffers() {
  const std::vector<Message> outgoing(sources_.size(), encode(offer()));
  std::vector<CombineEntry> entries;
  for (const Message& message : exchangeEntries(context_, outgoing)) {
    entries.push_back(message.empty() ? CombineEntry{} : decode<CombineEntry>(message));
  }
  return entries;
}

/// What pulling and pushing have in common.
void RowReducer::describe(SumArguments& sum) {
  sum.out = static_cast<std::byte*>(request_.outputs.x.data);
  sum.dtype = request_.inputs.x.dtype;
  sum.hidden = request_.signature.hidden;
  sum.bias0 = static_cast<const std::byte*>(request_.inputs.bias0.data);
  sum.bias1 = static_cast<const std::byte*>(request_.inputs.bias1.data);
  if (weightBytes_ != 0) {
    sum.outWeights = static_cast<float*>(request_.outputs.topkWeights.data);
    sum.topk = request_.signature.topk;
  }
  sum.head = routing_.head;
  sum.sources = context_.perRank(sources_);
  if (!countsOnHost()) sum.firstRows = routing_.count(map_.firstRows());
  sum.numTokens = handle_.numTokens;
  sum.numRanks = context_.size();
  sum.rowAlignment = rowAlignment();
  sum.order = context_.order;
}

void RowReducer::bindSpan(std::size_t rank) {
  sources_[rank].span = {handle_.firstRowAt[rank], handle_.capacityAt[rank]};
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

void RowReducer::pull(const std::vector<CombineEntry>& entries) {
  const TraceScope scope(context_.trace, "reduce");
  context_.stats.pulledRows += numReceived();
  for (std::size_t r = 0; r < sources_.size(); ++r) bindReadable(r, entries[r]);
  SumArguments arguments;
  describe(arguments);
  if (checks()) sealRows();
  sumRows(arguments, context_.numSms, context_.stream);
  if (!checks()) return;
  // Where there is no block for seals, rows are pushed.
  context_.arena.noteOperation(planLandings().bytes);
  std::vector<ArrayAddress> sealsAt;
  sealsAt.reserve(entries.size());
  for (const CombineEntry& entry : entries) sealsAt.push_back(entry.seals);
  verifyRows(arguments, false, sealsAt);
}

void RowReducer::bindReadable(std::size_t rank, const CombineEntry& entry) {
  bindSpan(rank);
  SumSource& source = sources_[rank];
  if (rank == self()) {
    source.rows = input();
    if (weightBytes_ != 0) source.weights = inputWeights();
    return;
  }
  const bool noRows = countsOnHost() && numRowsOf(rank) == 0;
  if (noRows || source.span.capacity == 0) return;
  const int peer = static_cast<int>(rank);
  const RowRange range{0, source.span.capacity};
  source.rows =
      peerRows(context_, peer, entry.rows, range, rowBytes_, itemSize(request_.inputs.x.dtype));
  if (weightBytes_ == 0) return;
  source.weights = reinterpret_cast<const float*>(
      peerRows(context_, peer, entry.weights, range, weightBytes_, sizeof(float)));
}

void RowReducer::push() {
  const TraceScope scope(context_.trace, "reduce");
  context_.stats.stagedRows += numReceived();
  std::vector<CombineLanding> landings;
  try {
    landings = makeLandings();
  } catch (const Error& error) {
    abandonRows(context_, Verdict::noRoom, error.what());
    throw OperationRefused{std::current_exception()};
  }
  std::vector<Message> outgoing;
  outgoing.reserve(landings.size());
  for (const CombineLanding& landing : landings) outgoing.push_back(encode(landing));
  const auto& published = exchangePublications(context_, outgoing, "combine");
  std::vector<LandingTarget> targets;
  std::vector<ArrayAddress> sealsAt;
  targets.reserve(sources_.size());
  sealsAt.reserve(sources_.size());
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    // Nothing goes to a masked rank.
    const bool absent = published[r].empty();
    const auto landing = absent ? CombineLanding{} : decode<CombineLanding>(published[r]);
    targets.push_back(absent ? LandingTarget{} : bindTarget(r, landing));
    sealsAt.push_back(landing.seals);
  }
  PushSumArguments arguments;
  describe(arguments.sum);
  arguments.rows = input();
  if (weightBytes_ != 0) arguments.weights = inputWeights();
  arguments.targets = context_.perRank(targets);
  if (!countsOnHost()) {
    arguments.firstRowFrom = routing_.count(map_.firstRowFrom());
    arguments.numKeptFrom = routing_.count(map_.numKeptFrom());
  }
  arguments.flags = context_.perRank(flags_);
  arguments.chunkRows = landingChunkRows(static_cast<std::int64_t>(rowBytes_));
  arguments.nextChunk = context_.nextChunk;
  context_.meetRanks();
  if (checks()) sealRows();
  if (context_.mayLose()) enter(targets, arguments);
  pushAndSumRows(arguments, context_.numSms, context_.stream);
  if (context_.mayLose()) sumWithoutLost(arguments, context_.numSms, context_.stream);
  if (checks()) verifyRows(arguments.sum, true, sealsAt);
  if (!context_.mayLose()) return;
  const bool landing = landing_.address.access == Access::landing;
  context_.losses->note({{landing_.data.get()}, landing}, context_.stream, context_.capturing);
}

/// Where ranks may be lost, which ones this operation is without is decided before rows are pushed.
void RowReducer::enter(const std::vector<LandingTarget>& targets, PushSumArguments& arguments) {
  std::vector<Place> known;
  known.reserve(targets.size());
  for (std::size_t r = 0; r < targets.size(); ++r) {
    known.push_back({static_cast<std::int32_t>(handle_.firstRowAt[r]),
                     static_cast<std::int32_t>(targets[r].numKept)});
  }
  EntryArguments entry;
  entry.known = context_.perRank(known);
  entry.firstRows = arguments.sum.firstRows;
  entry.numKeptFrom = arguments.numKeptFrom;
  entry.places = context_.losses->places();
  entry.order = context_.order;
  enterOperation(entry, context_.stream);
  arguments.sum.firstRows = entry.places.firstRows;
  arguments.numKeptFrom = entry.places.numKeptFrom;
}

/// How many rows a rank may push: one for each token that was sent to it.
std::int64_t RowReducer::numRowsOf(std::size_t source) const {
  if (!countsOnHost()) return handle_.numTokens;
  return rowsKept(handle_.firstRowAt[source], handle_.plan->numRows[source],
                  handle_.capacityAt[source]);
}

/// A place for the rows of each other rank, each aligned as rows of any kind may be, behind the
/// seals of this rank's.
RowReducer::LandingPlan RowReducer::planLandings() const {
  LandingPlan plan{std::vector<std::size_t>(sources_.size()),
                   std::vector<std::size_t>(sources_.size()),
                   alignUp(sealBytes(), kRegionAlignment)};
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    if (r == self()) continue;
    plan.rowsAt[r] = plan.bytes;
    plan.bytes = alignUp(plan.bytes + arrayBytes(numRowsOf(r), rowBytes_), kRegionAlignment);
    plan.weightsAt[r] = plan.bytes;
    plan.bytes = alignUp(plan.bytes + arrayBytes(numRowsOf(r), weightBytes_), kRegionAlignment);
  }
  return plan;
}

std::vector<CombineLanding> RowReducer::makeLandings() {
  const auto [rowsAt, weightsAt, bytes] = planLandings();
  std::vector<CombineLanding> landings(sources_.size());
  for (std::size_t r = 0; r < sources_.size(); ++r) bindSpan(r);
  context_.arena.noteOperation(bytes);
  if (auto block = context_.arena.allocate(bytes)) {
    landing_ = std::move(*block);
  } else {
    context_.settleLanding();
    landing_ = context_.arena.landing(bytes);
  }
  context_.keep(landing_.data);
  seals_ = landing_;
  const std::int64_t chunkRows = landingChunkRows(static_cast<std::int64_t>(rowBytes_));
  const ArenaBlock& flags = context_.flags.reserve(
      context_.arena, landingFlagBytes(context_.size(), handle_.numTokens, chunkRows),
      context_.stream, context_.capturing);
  const auto words = static_cast<std::size_t>(landingFlags(handle_.numTokens, chunkRows));
  for (std::size_t r = 0; r < sources_.size(); ++r) {
    const std::size_t flagsAt = r * words * sizeof(std::uint64_t);
    flags_.push_back(reinterpret_cast<const std::uint64_t*>(flags.data.get() + flagsAt));
    SumSource& source = sources_[r];
    const bool own = r == self();
    source.rows = own ? input() : landing_.data.get() + rowsAt[r];
    if (weightBytes_ != 0) {
      source.weights =
          own ? inputWeights() : reinterpret_cast<const float*>(landing_.data.get() + weightsAt[r]);
    }
    landings[r].numRows = numRowsOf(r);
    landings[r].rows = landings[r].weights = landing_.address;
    landings[r].rows.offset += rowsAt[r];
    landings[r].weights.offset += weightsAt[r];
    landings[r].flags = flags.address;
    landings[r].flags.offset += flagsAt;
    landings[r].seals = seals_.address;
  }
  return landings;
}

LandingTarget RowReducer::bindTarget(std::size_t rank, const CombineLanding& landing) const {
  LandingTarget target;
  if (rank == self()) return target;
  std::int64_t room = handle_.numRows;
  if (countsOnHost()) {
    target.firstRow = handle_.firstRowFrom[rank];
    target.numKept = rowsKept(target.firstRow, handle_.numRowsFrom[rank], handle_.numRows);
    if (context_.mayLose()) {
      // Of the dispatch in which they parted, ranks may have kept different accounts.
      target.numKept = std::clamp<std::int64_t>(landing.numRows, 0, target.numKept);
    }
    room = target.numKept;
  }
  if (room == 0) return target;
  const int peer = static_cast<int>(rank);
  // The owner has a row for each of its tokens, and the host may not know how many those are.
  const RowRange range{0, countsOnHost() ? room : 0};
  target.rows = peerRows(context_, peer, landing.rows, range, rowBytes_, kRegionAlignment);
  if (weightBytes_ != 0) {
    target.weights = reinterpret_cast<float*>(
        peerRows(context_, peer, landing.weights, range, weightBytes_, kRegionAlignment));
  }
  target.flags = reinterpret_cast<std::uint64_t*>(peerRows(
      context_, peer, landing.flags, {0, 0}, sizeof(std::uint64_t), sizeof(std::uint64_t)));
  return target;
}

void RowReducer::sealRows() {
  ReturnedRows returned;
  returned.rows = input();
  returned.rowBytes = static_cast<std::int64_t>(rowBytes_);
  if (weightBytes_ != 0) returned.weights = inputWeights();
  returned.topk = request_.signature.topk;
  returned.numRows = numReceived();
  returned.sourceTokens = static_cast<const std::int32_t*>(handle_.sourceTokensOnGpu.get());
  returned.seals = reinterpret_cast<RowSeal*>(seals_.data.get());
  returned.order = context_.order;
  context_.keep(handle_.sourceTokensOnGpu);
  sealReturnedRows(returned, context_.numSms, context_.stream);
}

void RowReducer::verifyRows(const SumArguments& sum, bool landed,
                            const std::vector<ArrayAddress>& sealsAt) {
  std::vector<const RowSeal*> seals(sources_.size());
  for (std::size_t r = 0; r < seals.size(); ++r) {
    if (r == self() || numRowsOf(r) == 0 || sources_[r].span.capacity == 0) continue;
    if (context_.masked(r)) continue;
    // The owner has a seal for each row, and the host may not know how many those are.
    const RowRange range{0, countsOnHost() ? sources_[r].span.firstRow + numRowsOf(r) : 0};
    seals[r] = reinterpret_cast<const RowSeal*>(peerRows(context_, static_cast<int>(r), sealsAt[r],
                                                         range, sizeof(RowSeal), alignof(RowSeal)));
  }
  verifySummedRows({sum, static_cast<std::int64_t>(rowBytes_), landed, context_.perRank(seals)},
                   context_.numSms, context_.stream);
  concludeChecks(context_.order, {}, context_.stream);
}

}  // namespace

void combineRows(Context& context, const CombineRequest& request) {
  RowReducer(context, request).run();
}

}  // namespace mscclpp_ep::cuda
