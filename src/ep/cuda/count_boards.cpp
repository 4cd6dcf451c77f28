// SPDX-License-Identifier: MIT
#include "cuda/count_boards.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <map>
#include <mutex>
#include <ranges>
#include <utility>

#include "core/memory_map.hpp"
#include "core/packets.hpp"
#include "cuda/mapped.hpp"
#include "transport/cuda_check.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep::cuda {

namespace {

/// Counts that one rank tells, as they come.
class Incoming {
 public:
  Incoming(const std::uint64_t* words, std::size_t count, std::uint64_t epoch)
      : words_(words), counts_(count), tag_(static_cast<std::uint32_t>(epoch)) {}

  bool complete() {
    while (known_ < counts_.size() && take(acquire(words_[known_]))) ++known_;
    return known_ == counts_.size();
  }
  std::int64_t operator[](std::size_t i) const { return counts_[i]; }

 private:
  /// A word never written is 0. A rank that has given up this operation may have begun others, but
  /// no more than there is room for their messages: its counts mean nothing, as its refusal is on
  /// the way.
  bool take(std::uint64_t word) {
    constexpr std::uint32_t kMostAhead = 2 * kMailboxDepth;
    const std::uint32_t ahead = signalTag(word) - tag_;
    if (signalValue(word) == 0 || ahead > kMostAhead) return false;
    counts_[known_] = ahead == 0 ? std::int64_t{signalValue(word)} - 1 : 0;
    return true;
  }

  const std::uint64_t* words_;
  std::vector<std::int64_t> counts_;
  std::uint32_t tag_;
  std::size_t known_ = 0;
};

/// Waits for the counts of all ranks, of which this one knows its own.
void await(const HostContext& context, std::vector<Incoming>& incoming) {
  constexpr std::chrono::microseconds kSoon{20};
  constexpr auto kRound = static_cast<std::uint32_t>(Round::counts);
  constexpr const char* kWhat = "the counts";
  const auto ranks = std::views::iota(0, context.size());
  const auto isMissing = [&](int rank) {
    return !context.masked(rank) && !incoming[static_cast<std::size_t>(rank)].complete();
  };
  const auto complete = [&] { return std::ranges::none_of(ranks, isMissing); };
  const auto missing = [&] {
    Awaited late{{}, kWhat};
    std::ranges::copy_if(ranks, std::back_inserter(late.ranks), isMissing);
    return late;
  };
  context.mailbox.post(context.epoch, kRound, std::vector<Message>(incoming.size()), kWhat);
  if (spinUntil(complete, kSoon)) return;
  // No GPU wakes a host that sleeps: its own host does, when it has been told.
  context.mailbox.collect(context.epoch, kRound, kWhat);
  context.transport.wait(complete, missing);
}

}  // namespace

/// The boards of one receiver, in reach of all GPUs of this process: ranks that are its threads
/// share the mapping.
class CountBoards::Registration {
 public:
  static std::shared_ptr<Registration> of(std::byte* boards, std::size_t bytes,
                                          std::shared_ptr<const void> owner) {
    static std::mutex mutex;
    static auto& known = *new std::map<std::byte*, std::weak_ptr<Registration>>;
    const std::lock_guard lock(mutex);
    std::erase_if(known, [](const auto& entry) { return entry.second.expired(); });
    if (const auto found = known.find(boards); found != known.end()) {
      if (auto made = found->second.lock()) return made;
    }
    auto made = std::make_shared<Registration>(boards, bytes, std::move(owner));
    known.insert_or_assign(boards, made);
    return made;
  }

  Registration(std::byte* boards, std::size_t bytes, std::shared_ptr<const void> owner)
      : device_(currentDevice()), boards_(boards), owner_(std::move(owner)) {
    EP_CUDA_TRY(cudaHostRegister(boards_, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
                "cannot let the GPU reach memory that the hosts of the ranks share");
  }
  ~Registration() {
    releaseWhenIdle(device_,
                    [boards = boards_, owner = owner_] { (void)cudaHostUnregister(boards); });
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;

  std::byte* onGpu() const {
    void* data = nullptr;
    EP_CUDA_TRY(cudaHostGetDevicePointer(&data, boards_, 0),
                "cannot tell where the GPU finds memory of the hosts");
    return static_cast<std::byte*>(data);
  }

 private:
  int device_;
  std::byte* boards_;
  std::shared_ptr<const void> owner_;
};

CountBoards::CountBoards(const Transport& transport) {
  const int size = transport.size();
  const ControlMap map(size);
  const std::size_t own = map.counts(transport.rank()) - map.counts(0);
  std::vector<std::uint64_t*> outgoing;
  for (int peer = 0; peer < size; ++peer) {
    registrations_.push_back(Registration::of(transport.control(peer) + map.counts(0),
                                              map.bytes() - map.counts(0),
                                              transport.controlOwner(peer)));
    outgoing.push_back(reinterpret_cast<std::uint64_t*>(registrations_.back()->onGpu() + own));
    incoming_.push_back(reinterpret_cast<const std::uint64_t*>(transport.control(transport.rank()) +
                                                               map.counts(peer)));
  }
  if (size <= PerRank<int>::kMost) {
    std::ranges::copy(outgoing, outgoing_.few);
    return;
  }
  many_.emplace(outgoing.size());
  many_->write(outgoing);
  outgoing_.many = many_->get();
}

bool CountBoards::fit(const ExpertPlacement& placement, int numRanks) {
  for (int rank = 0; rank < numRanks; ++rank) {
    if (1 + placement.numLocal(rank) > static_cast<std::int64_t>(kCountWords)) return false;
  }
  return true;
}

void CountBoards::receive(const HostContext& context, std::int64_t numLocalExperts,
                          DispatchPlan& plan) const {
  const TraceScope scope(context.trace, "counts");
  const auto experts = static_cast<std::size_t>(numLocalExperts);
  std::vector<Incoming> incoming;
  incoming.reserve(incoming_.size());
  for (const std::uint64_t* words : incoming_) {
    incoming.emplace_back(words, 1 + experts, context.epoch);
  }
  await(context, incoming);
  plan.perExpert.assign(experts, 0);
  for (std::size_t r = 0; r < incoming.size(); ++r) {
    if (context.masked(r)) {
      plan.numRowsFrom[r] = 0;
      continue;
    }
    // Counts that are out of range are refused where they were given, before rows move.
    plan.numRowsFrom[r] = std::min(incoming[r][0], plan.numRowsFrom[r]);
    for (std::size_t e = 0; e < experts; ++e) plan.perExpert[e] += incoming[r][1 + e];
  }
}

}  // namespace mscclpp_ep::cuda
