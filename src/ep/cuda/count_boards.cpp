// SPDX-License-Identifier: MIT
#include "cuda/count_boards.hpp"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "core/memory_map.hpp"
#include "transport/cuda_check.hpp"
#include "transport/cuda_memory.hpp"

namespace mscclpp_ep::cuda {

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
  std::vector<std::uint64_t*> places;
  for (int peer = 0; peer < size; ++peer) {
    registrations_.push_back(Registration::of(transport.control(peer) + map.counts(0),
                                              map.bytes() - map.counts(0),
                                              transport.controlOwner(peer)));
    places.push_back(reinterpret_cast<std::uint64_t*>(registrations_.back()->onGpu() + own));
  }
  if (size <= PerRank<int>::kMost) {
    std::ranges::copy(places, places_.few);
    return;
  }
  many_.emplace(places.size());
  many_->write(places);
  places_.many = many_->get();
}

}  // namespace mscclpp_ep::cuda
