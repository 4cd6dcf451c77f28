// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/agreement.hpp"
#include "core/check.hpp"

namespace mscclpp_ep {
namespace {

/// The message of the error that is carried, if it is of class E.
template <typename E>
std::string messageOf(const std::function<void()>& work) {
  try {
    work();
  } catch (const OperationRefused& refused) {
    try {
      std::rethrow_exception(refused.error);
    } catch (const E& error) {
      return error.what();
    }
  }
  return "nothing was thrown";
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Signature someSignature() {
  Signature signature;
  signature.operation = static_cast<std::uint32_t>(Operation::dispatch);
  signature.dtype = static_cast<std::uint32_t>(DataType::bfloat16);
  signature.hidden = 64;
  signature.numExperts = 8;
  return signature;
}

std::string disagreement(const std::function<void(Signature&)>& change) {
  std::vector<Signature> signatures(3, someSignature());
  change(signatures[1]);
  return messageOf<InvalidArgument>([&] { requireAgreement(signatures); });
}

TEST_CASE("ranks that agree, and a rank alone") {
  CHECK_NOTHROW(requireAgreement(std::vector<Signature>(4, someSignature())));
  CHECK_NOTHROW(requireAgreement(std::vector<Signature>(1, someSignature())));
}

TEST_CASE("what differs is named, with who has what") {
  const std::string hidden = disagreement([](Signature& s) { s.hidden = 128; });
  CHECK(has(hidden, "the ranks disagree on the hidden size (H): "));
  CHECK(has(hidden, "128 on rank 1"));
  CHECK(has(hidden, "64 on ranks 0, 2"));
  const std::string operation = disagreement(
      [](Signature& s) { s.operation = static_cast<std::uint32_t>(Operation::combine); });
  CHECK(has(operation, "combine on rank 1"));
  CHECK(has(operation, "dispatch on ranks 0, 2"));
  CHECK(has(disagreement([](Signature& s) { s.numExperts = 9; }), "experts (E): 8 on ranks 0, 2"));
  CHECK(has(
      disagreement([](Signature& s) { s.dtype = static_cast<std::uint32_t>(DataType::float16); }),
      "float16 on rank 1"));
  CHECK(has(disagreement([](Signature& s) { s.handleEpoch = 5; }), "5 on rank 1"));
}

TEST_CASE("every field is compared") {
  const std::function<void(Signature&)> changes[] = {
      [](Signature& s) { s.operation = 2; },  [](Signature& s) { s.dtype = 1; },
      [](Signature& s) { s.scaleDtype = 1; }, [](Signature& s) { s.hasWeights = 1; },
      [](Signature& s) { s.hidden = 1; },     [](Signature& s) { s.numScales = 1; },
      [](Signature& s) { s.topk = 0; },       [](Signature& s) { s.indexBytes = 4; },
      [](Signature& s) { s.numExperts = 1; }, [](Signature& s) { s.handleEpoch = 1; }};
  for (const auto& change : changes) CHECK(has(disagreement(change), " on rank 1"));
}

TEST_CASE("what explains most comes first") {
  const std::string text = disagreement([](Signature& s) {
    s.operation = static_cast<std::uint32_t>(Operation::combine);
    s.hidden = 1;
    s.topk = 3;
  });
  CHECK(has(text, "disagree on the operation"));
}

TEST_CASE("a refusal names the rank, the operation and the reason") {
  std::vector<Status> statuses(3);
  CHECK_NOTHROW(requireAll(statuses, "combine"));
  statuses[2] = refusal(Verdict::rejected, "H is odd");
  CHECK(messageOf<PeerFailure>([&] { requireAll(statuses, "combine"); }) ==
        "rank 2 refused the combine: H is odd");
  statuses[1] = refusal(Verdict::noRoom, "it needs 7 bytes");
  CHECK(messageOf<PeerFailure>([&] { requireAll(statuses, "dispatch"); }) ==
        "rank 1 has no room for the dispatch: it needs 7 bytes");
}

TEST_CASE("a long reason is cut, and stays terminated") {
  const std::string reason(10000, 'r');
  const Status status = refusal(Verdict::rejected, reason);
  CHECK(std::strlen(status.reason) == kReasonBytes - 1);
  // A status that a faulty peer wrote need not be terminated.
  Status faulty;
  faulty.verdict = Verdict::rejected;
  std::memset(faulty.reason, 'f', sizeof(faulty.reason));
  const std::vector<Status> statuses{faulty};
  const std::string text = messageOf<PeerFailure>([&] { requireAll(statuses, "dispatch"); });
  CHECK(has(text, std::string(kReasonBytes, 'f')));
}

TEST_CASE("signals carry a value and a tag, of which only 32 bits count") {
  const std::uint64_t signal = packSignal(7, (std::uint64_t{1} << 32) + 9);
  CHECK(signalValue(signal) == 7);
  CHECK(signalTag(signal) == 9);
  CHECK(signalTag(packSignal(~0u, ~std::uint64_t{0})) == ~0u);
  CHECK(signalValue(packSignal(~0u, 0)) == ~0u);
}

}  // namespace
}  // namespace mscclpp_ep
