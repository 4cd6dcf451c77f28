// SPDX-License-Identifier: MIT
// The order of high-throughput operations, and what ends a buffer: alike wherever rows are. The
// backends derive theirs, and move the rows.
#ifndef MSCCLPP_EP_HOST_BACKEND_HPP_
#define MSCCLPP_EP_HOST_BACKEND_HPP_

#include <sys/types.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/agreement.hpp"
#include "core/backend.hpp"
#include "core/check.hpp"
#include "host/context.hpp"
#include "host/exchange_counts.hpp"
#include "transport/shared_memory.hpp"

namespace mscclpp_ep {

class HostBackend : public Backend, public std::enable_shared_from_this<HostBackend> {
 public:
  void beginCall(const CallOptions&) override {}
  void endCall(const CallOptions&) override {}
  std::unique_ptr<PendingState> beginDispatch(DispatchRequest request) final;
  DispatchHandle finishDispatch(PendingState& pending, const DispatchOutputs& outputs) final;
  void abandonDispatch(PendingState& pending, std::string_view why) final;
  void combine(const CombineRequest& request) final;
  void refuse(Operation operation, std::string_view why) override;

  Tensor allocate(std::size_t bytes, MemoryKind kind, Stream stream) override;
  std::vector<std::int64_t> readCounts(const HandleState&) override { return {}; }
  std::vector<double> timePush(std::size_t, int, int) override {
    throw NotBuilt("the time of a push is measured on GPUs only");
  }
  void recordStream(Stream) override {}
  void forgetStream(Stream) override {}
  void check() override;
  bool masked(int rank) override { return transport_->masked(rank); }
  void setMask(int rank, bool masked) override;
  void store(const TensorView& out, const std::vector<std::int32_t>& values, Stream) override {
    std::copy(values.begin(), values.end(), static_cast<std::int32_t*>(out.data));
  }
  void freeze() final;
  BufferStats stats() final;
  void destroy() final;

 protected:
  HostBackend(std::unique_ptr<Transport> transport, std::unique_ptr<Trace> trace,
              const BufferOptions& options, std::size_t initialArenaBytes, std::uint64_t bufferId,
              MakeFence makeFence = {});

  /// The second half of a dispatch: publishes where rows go, sends and receives them.
  virtual std::shared_ptr<const HandleState> moveRows(const DispatchRequest& request,
                                                      const DispatchPlan& plan,
                                                      const DispatchOutputs& outputs) = 0;
  virtual void combineRows(const CombineRequest& request) = 0;
  /// Ordinary memory, that peers do not reach, recycled, as allocate() says.
  virtual std::shared_ptr<std::byte> allocateOrdinary(std::size_t bytes, Stream stream) = 0;
  virtual std::int64_t ordinaryBytes() = 0;

  /// Takes the counts that GPUs tell, once the ranks have entered: of a request whose counts
  /// follow.
  virtual void receiveCounts(DispatchRequest&, DispatchPlan&) {}
  /// Throws InvalidArgument if a dispatch is refused after all: what its arguments say was not all
  /// known when it began.
  virtual void requireSound(const DispatchRequest&) {}
  /// Throws what went wrong behind the host's back since it looked last.
  virtual void notice() {}
  /// Ends waits that are behind the host's back: the buffer has failed.
  virtual void abort() noexcept {}
  /// Waits, within the timeout, until nothing is done any more behind the host's back.
  virtual void settle() {}

  /// Runs one step of an operation. An error that every rank sees alike passes; any other ends the
  /// buffer, and the peers are told.
  template <typename Step>
  auto run(const char* operation, const Step& step);

  /// The modes of a call, for Transport::enterCall.
  enum class Mode : std::uint32_t { highThroughput = 1, lowLatency = 2 };
  void enter(Mode mode, const char* operation, std::uint64_t epoch);

  void beginEpoch(const char* operation);
  /// Of the next operation.
  std::uint64_t nextEpoch() const { return nextEpoch_; }
  bool inChild() const;
  void refuseChild() const;
  void requireUsable();
  /// Whether it has not failed.
  bool usable() const { return failure_.empty(); }
  /// Whether all ranks have said goodbye.
  bool left() const { return left_; }
  void requireNoDispatch() const;

  std::unique_ptr<Transport> transport_;
  Mailbox mailbox_;
  Arena arena_;
  std::unique_ptr<Trace> trace_;
  BufferStats stats_;
  HostContext context_;
  bool begun_ = false;  ///< a dispatch is between its two calls

 private:
  friend struct HostPending;

  /// Ends the operation in the trace with the call that ends it.
  struct TracedCall {
    ~TracedCall() {
      if (!backend.begun_) backend.trace_->endOperation();
    }
    HostBackend& backend;
  };

  void fail(std::string why);
  DispatchPlan enterDispatch(DispatchRequest& request);
  void refuseUnsound(const DispatchRequest& request);
  void reportDropped(const DispatchPlan& plan);

  std::uint64_t nextEpoch_;
  const pid_t process_;
  bool left_ = false;
  std::string failure_;  ///< why the buffer can only be destroyed; empty if it can be used
  std::string dropped_;  ///< for the next check()
};

template <typename Step>
auto HostBackend::run(const char* operation, const Step& step) {
  requireUsable();
  const TracedCall traced{*this};
  try {
    return step();
  } catch (const OperationRefused& refused) {
    std::rethrow_exception(refused.error);
  } catch (const std::exception& error) {
    fail(error.what());
    throw;
  } catch (...) {
    fail(cat(operation, " was interrupted"));
    throw;
  }
}

/// Off if no file is named. A rank that is refused makes none.
std::unique_ptr<Trace> openTrace(BufferOptions& options, const Bootstrap& bootstrap,
                                 std::uint64_t bufferId);

/// How the ranks of a host connect, by a buffer's options.
SharedMemoryOptions transportOptions(const Admission& admission, const BufferOptions& options);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_HOST_BACKEND_HPP_
