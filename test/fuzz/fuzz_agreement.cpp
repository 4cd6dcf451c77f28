// SPDX-License-Identifier: MIT
// What the entries of peers say: whether they take part, and in what.
#include "core/check.hpp"
#include "host/rounds.hpp"
#include "support/input.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep;
  fuzz::Input input(data, size);
  EntryHead own;
  own.signature.operation = 1;
  own.signature.topk = 4;
  const auto operation = static_cast<Operation>(own.signature.operation);
  const std::string why = input.text(static_cast<std::size_t>(input.upTo(255)));
  const Status refused = refusal(Verdict::rejected, why);
  fuzz::must(reasonOf(refused).size() < kReasonBytes, "a reason is terminated");

  fuzz::Bytes message = encode(own);
  input.damage(message);
  const std::string raw = input.text(input.flag() ? message.size() : 0);
  if (!raw.empty()) std::memcpy(message.data(), raw.data(), std::min(raw.size(), message.size()));
  fuzz::endsTyped([&] {
    const auto head = decode<EntryHead>(message);
    fuzz::must(cat(reasonOf(head.status), name(operation)).size() < 512, "a reason has an end");
    const Signature signatures[] = {own.signature, head.signature, own.signature};
    fuzz::endsTyped([&] { requireAgreement(signatures); });
    const Status statuses[] = {own.status, head.status, own.status};
    requireAll(statuses, name(operation));
  });
  return 0;
}
