// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <memory>
#include <vector>

#include "mscclpp_ep/error.hpp"
#include "mscclpp_ep/memory_pool.hpp"

namespace mscclpp_ep {

extern "C" void* mscclpp_ep_pool_allocate_0(std::size_t bytes, int device, void* stream);
extern "C" void mscclpp_ep_pool_free_0(void* data, std::size_t bytes, int device, void* stream);

namespace {

constexpr std::size_t kBytes = 1 << 20;

Tensor someMemory() {
  auto bytes = std::make_shared<std::vector<std::byte>>(kBytes);
  Tensor memory;
  memory.view = makeView(bytes->data(), DataType::uint8, {kBytes});
  memory.owner = bytes;
  return memory;
}

TEST_CASE("a pool gives out its memory until it is full, and again") {
  const Tensor memory = someMemory();
  MemoryPool pool(memory);
  REQUIRE(pool.allocateName() == "mscclpp_ep_pool_allocate_0");
  CHECK(pool.freeName() == "mscclpp_ep_pool_free_0");
  void* all = mscclpp_ep_pool_allocate_0(kBytes, 0, nullptr);
  CHECK(all == memory.view.data);
  CHECK(pool.usedBytes() == kBytes);
  CHECK(mscclpp_ep_pool_allocate_0(1, 0, nullptr) == nullptr);
  mscclpp_ep_pool_free_0(all, kBytes, 0, nullptr);
  CHECK(pool.usedBytes() == 0);
  void* part = mscclpp_ep_pool_allocate_0(1000, 0, nullptr);
  void* other = mscclpp_ep_pool_allocate_0(1000, 0, nullptr);
  CHECK(part != nullptr);
  CHECK(part != other);
  mscclpp_ep_pool_free_0(part, 1000, 0, nullptr);
  mscclpp_ep_pool_free_0(other, 1000, 0, nullptr);
}

TEST_CASE("what was given out keeps the memory, and its place, when the pool has gone") {
  Tensor memory = someMemory();
  const std::weak_ptr<void> watched = memory.owner;
  void* part = nullptr;
  {
    const MemoryPool pool(std::move(memory));
    REQUIRE(pool.allocateName() == "mscclpp_ep_pool_allocate_0");
    part = mscclpp_ep_pool_allocate_0(64, 0, nullptr);
  }
  CHECK(!watched.expired());
  const MemoryPool next(someMemory());
  CHECK(next.allocateName() == "mscclpp_ep_pool_allocate_1");
  CHECK(mscclpp_ep_pool_allocate_0(64, 0, nullptr) == nullptr);
  mscclpp_ep_pool_free_0(part, 64, 0, nullptr);
  CHECK(watched.expired());
}

TEST_CASE("pools are few") {
  std::vector<std::unique_ptr<MemoryPool>> pools;
  CHECK_THROWS_AS(
      for (int i = 0; i <= MemoryPool::kMost;
           ++i) { pools.push_back(std::make_unique<MemoryPool>(someMemory())); },
      InvalidArgument);
}

}  // namespace
}  // namespace mscclpp_ep
