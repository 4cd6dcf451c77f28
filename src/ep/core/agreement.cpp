// SPDX-License-Identifier: MIT
#include "core/agreement.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

struct Field {
  const char* name;
  std::string (*value)(const Signature&);
};

/// Of any number, as a peer wrote it.
std::string dtypeName(std::uint32_t dtype) {
  constexpr auto kLast = static_cast<std::uint32_t>(DataType::float8E5m2Fnuz);
  return dtype <= kLast ? name(static_cast<DataType>(dtype)) : cat("the unknown code ", dtype);
}
std::string given(bool yes) { return yes ? "given" : "not given"; }

// The first that differs is reported, so what explains most comes first.
constexpr Field kFields[] = {
    {"the operation",
     [](const Signature& s) -> std::string { return name(static_cast<Operation>(s.operation)); }},
    {"the hidden size (H)", [](const Signature& s) { return cat(s.hidden); }},
    {"the number of experts (E)", [](const Signature& s) { return cat(s.numExperts); }},
    {"whether topk_idx is given", [](const Signature& s) { return given(s.topk >= 0); }},
    {"the choices a token (K)", [](const Signature& s) { return cat(s.topk); }},
    {"the dtype of x", [](const Signature& s) { return dtypeName(s.dtype); }},
    {"the scales a token", [](const Signature& s) { return cat(s.numScales); }},
    {"the dtype of the scales", [](const Signature& s) { return dtypeName(s.scaleDtype); }},
    {"the bytes of an element of topk_idx", [](const Signature& s) { return cat(s.indexBytes); }},
    {"whether topk_weights is given", [](const Signature& s) { return given(s.hasWeights != 0); }},
    {"whether num_worst_tokens is given",
     [](const Signature& s) { return given(s.countsOnGpu != 0); }},
    {"num_max_dispatch_tokens_per_rank (M)", [](const Signature& s) { return cat(s.maxTokens); }},
    {"how rows are quantised", [](const Signature& s) { return cat("kind ", s.quantization); }},
    {"exact", [](const Signature& s) { return cat(s.exact != 0); }},
    {"use_logfmt", [](const Signature& s) { return cat(s.logfmt != 0); }},
    {"the epoch of the handle's dispatch", [](const Signature& s) { return cat(s.handleEpoch); }},
};

/// "64 on rank 1; 128 on ranks 0, 2"
std::string whoHasWhat(const Field& field, std::span<const Signature> signatures) {
  std::map<std::string, std::vector<std::size_t>> ranks;
  for (std::size_t r = 0; r < signatures.size(); ++r) {
    ranks[field.value(signatures[r])].push_back(r);
  }
  std::string text;
  for (const auto& [value, who] : ranks) {
    text += cat(text.empty() ? "" : "; ", value, who.size() == 1 ? " on rank " : " on ranks ", who);
  }
  return text;
}

}  // namespace

const char* name(Operation operation) {
  switch (operation) {
    case Operation::dispatch:
      return "dispatch";
    case Operation::cachedDispatch:
      return "cached dispatch";
    case Operation::combine:
      return "combine";
    case Operation::lowLatencyDispatch:
      return "low-latency dispatch";
    case Operation::lowLatencyCombine:
      return "low-latency combine";
  }
  return "an unknown operation";
}

Status refusal(Verdict verdict, std::string_view why) {
  Status status;
  status.verdict = verdict;
  std::size_t bytes = std::min(why.size(), sizeof(status.reason) - 1);
  // Not inside a character of UTF-8, whose later bytes begin with the bits 10.
  while (bytes < why.size() && bytes > 0 && (why[bytes] & 0xC0) == 0x80) --bytes;
  std::memcpy(status.reason, why.data(), bytes);
  return status;
}

std::string_view reasonOf(const Status& status) {
  return {status.reason, ::strnlen(status.reason, kReasonBytes)};
}

void requireAll(std::span<const Status> statuses, const char* operation) {
  for (std::size_t rank = 0; rank < statuses.size(); ++rank) {
    if (statuses[rank].verdict == Verdict::go) continue;
    const char* what =
        statuses[rank].verdict == Verdict::noRoom ? " has no room for the " : " refused the ";
    throw OperationRefused{std::make_exception_ptr(
        PeerFailure(cat("rank ", rank, what, operation, ": ", reasonOf(statuses[rank]))))};
  }
}

void requireAgreement(std::span<const Signature> signatures) {
  // Values are made texts only where there may be an error to tell.
  if (std::ranges::all_of(signatures,
                          [&](const Signature& other) { return other == signatures[0]; })) {
    return;
  }
  for (const Field& field : kFields) {
    const std::string first = field.value(signatures[0]);
    if (std::all_of(signatures.begin(), signatures.end(),
                    [&](const Signature& other) { return field.value(other) == first; })) {
      continue;
    }
    throw OperationRefused{std::make_exception_ptr(InvalidArgument(
        cat("the ranks disagree on ", field.name, ": ", whoHasWhat(field, signatures))))};
  }
}

}  // namespace mscclpp_ep
