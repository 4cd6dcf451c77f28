// SPDX-License-Identifier: MIT
#include "mscclpp_ep/handle.hpp"

#include "core/backend.hpp"
#include "core/check.hpp"
#include "core/handle_state.hpp"

namespace mscclpp_ep {

namespace {

const HandleState& checked(const std::shared_ptr<const HandleState>& state) {
  EP_EXPECTS(state != nullptr, "the handle is empty; use one that finishDispatch returned");
  return *state;
}

}  // namespace

std::int64_t DispatchHandle::numTokens() const { return checked(state_).numTokens; }
std::int64_t DispatchHandle::numRows() const { return checked(state_).numRows; }
std::int64_t DispatchHandle::numRecvTokens() const { return checked(state_).numRecv(); }
Layout DispatchHandle::layout() const { return checked(state_).layout; }
std::uint64_t DispatchHandle::epoch() const { return checked(state_).epoch; }
std::span<const std::int64_t> DispatchHandle::numRecvTokensPerExpert() const {
  return checked(state_).perExpert;
}
std::span<const std::int64_t> DispatchHandle::numSendTokens() const {
  const auto& plan = checked(state_).plan;
  return plan != nullptr ? std::span<const std::int64_t>(plan->numRows)
                         : std::span<const std::int64_t>();
}
std::span<const std::int32_t> DispatchHandle::recvRankPrefixSum() const {
  return checked(state_).rankPrefixSum;
}
const Tensor& DispatchHandle::recvSourceIndex() const { return checked(state_).sourceIndex; }
const Tensor& DispatchHandle::sendHead() const { return checked(state_).sendHead; }
const Tensor& DispatchHandle::isTokenInRank() const { return checked(state_).isTokenInRank; }

const HandleFields& DispatchHandle::fields() const { return checked(state_).fields; }

PendingDispatch::PendingDispatch(std::unique_ptr<PendingState> state) : state_(std::move(state)) {}
PendingDispatch::PendingDispatch(PendingDispatch&&) noexcept = default;
PendingDispatch& PendingDispatch::operator=(PendingDispatch&&) noexcept = default;
PendingDispatch::~PendingDispatch() = default;

PendingState& PendingDispatch::state() const {
  EP_EXPECTS(state_ != nullptr, "the dispatch is finished already, or was moved from");
  return *state_;
}
std::int64_t PendingDispatch::numRows() const { return state().numRows; }
std::span<const std::int64_t> PendingDispatch::numRecvTokensPerExpert() const {
  return state().alignedPerExpert;
}

}  // namespace mscclpp_ep
