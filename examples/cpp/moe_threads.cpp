// SPDX-License-Identifier: MIT
// A mixture-of-experts layer over four ranks, which are threads of this process. Each token goes to
// the ranks of its two experts; expert e multiplies its rows by e + 1; the weighted results come
// back, summed per token. Exits with 1 unless they are what one rank alone would compute.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <mscclpp_ep/buffer.hpp>
#include <thread>
#include <utility>
#include <vector>

namespace ep = mscclpp_ep;

constexpr int kRanks = 4, kExperts = 8, kTokens = 100, kHidden = 16, kTopk = 2;
constexpr int kLocalExperts = kExperts / kRanks;

/// Runs the layer as one rank; returns the number of wrong values.
int runRank(ep::Bootstrap& bootstrap) {
  ep::Buffer buffer(bootstrap);
  const int rank = buffer.rank();

  // Tokens, and the experts that a router might choose for them.
  std::vector<float> x(kTokens * kHidden), weights(kTokens * kTopk, 0.5F);
  std::vector<std::int64_t> topkIdx(kTokens * kTopk);
  for (int i = 0; i < kTokens * kHidden; ++i) x[i] = static_cast<float>((rank * 31 + i) % 97);
  for (int t = 0; t < kTokens; ++t) {
    topkIdx[t * kTopk] = (rank + t) % kExperts;
    topkIdx[t * kTopk + 1] = (rank + 3 * t + 1) % kExperts;
  }
  const auto idx = ep::makeView(topkIdx.data(), ep::DataType::int64, {kTokens, kTopk});

  // How many tokens go where. This is local; everything below involves all ranks.
  std::vector<std::int32_t> perRank(kRanks), perExpert(kExperts);
  std::vector<std::uint8_t> inRank(kTokens * kRanks);
  const ep::LayoutOutputs layout{
      ep::makeView(perRank.data(), ep::DataType::int32, {kRanks}),
      ep::makeView(perExpert.data(), ep::DataType::int32, {kExperts}),
      ep::makeView(inRank.data(), ep::DataType::boolean, {kTokens, kRanks})};
  buffer.getDispatchLayout(idx, kExperts, layout);

  // Dispatch: first the number of rows that will come, then the rows, into memory of that size.
  ep::DispatchInputs inputs;
  inputs.x = ep::makeView(x.data(), ep::DataType::float32, {kTokens, kHidden});
  inputs.topkIdx = idx;
  inputs.topkWeights = ep::makeView(weights.data(), ep::DataType::float32, {kTokens, kTopk});
  inputs.isTokenInRank = layout.isTokenInRank;
  inputs.numTokensPerRank = layout.numTokensPerRank;
  inputs.numTokensPerExpert = layout.numTokensPerExpert;
  ep::PendingDispatch pending = buffer.beginDispatch(inputs);
  const std::int64_t rows = pending.numRows();
  const ep::Tensor recvX = buffer.empty({rows, kHidden}, ep::DataType::float32);
  const ep::Tensor recvIdx = buffer.empty({rows, kTopk}, ep::DataType::int64);
  const ep::Tensor recvWeights = buffer.empty({rows, kTopk}, ep::DataType::float32);
  const ep::DispatchHandle handle =
      buffer.finishDispatch(std::move(pending), {recvX.view, {}, recvIdx.view, recvWeights.view});

  // The experts of this rank, in place: their ids are local now, -1 marks those of other ranks.
  auto* const values = static_cast<float*>(recvX.view.data);
  const auto* const ids = static_cast<const std::int64_t*>(recvIdx.view.data);
  const auto* const shares = static_cast<const float*>(recvWeights.view.data);
  for (std::int64_t row = 0; row < rows; ++row) {
    float factor = 0;
    for (std::int64_t k = row * kTopk; k < (row + 1) * kTopk; ++k) {
      if (ids[k] >= 0) factor += shares[k] * static_cast<float>(rank * kLocalExperts + ids[k] + 1);
    }
    for (int j = 0; j < kHidden; ++j) values[row * kHidden + j] *= factor;
  }

  // Combine: the rows go back to where their tokens came from.
  std::vector<float> out(kTokens * kHidden);
  const auto outView = ep::makeView(out.data(), ep::DataType::float32, {kTokens, kHidden});
  buffer.combine({recvX.view, {}, {}, {}}, handle, {outView, {}});
  buffer.destroy();

  int wrong = 0;
  for (int i = 0; i < kTokens * kHidden; ++i) {
    const std::int64_t* chosen = &topkIdx[i / kHidden * kTopk];
    wrong += out[i] != x[i] * 0.5F * static_cast<float>(chosen[0] + 1 + chosen[1] + 1);
  }
  std::printf("rank %d: sent %d tokens, received %lld rows, %d values wrong\n", rank, kTokens,
              static_cast<long long>(rows), wrong);
  return wrong;
}

int main() {
  const auto bootstraps = ep::makeLocalBootstraps(kRanks);
  std::atomic<int> wrong{0};
  std::vector<std::thread> ranks;
  for (const auto& bootstrap : bootstraps) {
    ranks.emplace_back([&wrong, bootstrap] {
      try {
        wrong += runRank(*bootstrap);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", bootstrap->rank(), error.what());
        ++wrong;
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  return wrong == 0 ? 0 : 1;
}
