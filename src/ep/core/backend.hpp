// SPDX-License-Identifier: MIT
// The seam of the library: what core/buffer.cpp, having checked every argument, asks of the code
// that moves data. One implementation a kind of memory: cpu/, cuda/.
#ifndef MSCCLPP_EP_CORE_BACKEND_HPP_
#define MSCCLPP_EP_CORE_BACKEND_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/handle_state.hpp"
#include "core/layout.hpp"
#include "core/low_latency_state.hpp"
#include "core/packets.hpp"
#include "core/routing.hpp"
#include "mscclpp_ep/buffer.hpp"

namespace mscclpp_ep {

/// A dispatch whose arguments are sound.
struct DispatchRequest {
  Signature signature;
  DispatchInputs inputs;
  DispatchOptions options;
  CallOptions call;
  std::int64_t numTokens = 0;
  std::shared_ptr<const ExpertPlacement> placement;
  Routing routing;
  std::shared_ptr<const HandleState> cached;  ///< whose routing is repeated; null: a new one

  /// Whether the host is told how many rows go where. If not, only the GPU knows.
  bool countsOnHost() const { return routing.plan != nullptr || routing.countsFollow; }
};

/// A combine whose arguments are sound.
struct CombineRequest {
  Signature signature;
  CombineInputs inputs;
  CombineOutputs outputs;
  CallOptions call;
  std::shared_ptr<const HandleState> handle;
};

/// A dispatch between its two calls. Backends derive theirs; its destructor refuses the operation
/// if it was not finished.
struct PendingState {
  PendingState() = default;
  PendingState(const PendingState&) = delete;
  PendingState& operator=(const PendingState&) = delete;
  virtual ~PendingState() = default;

  DispatchRequest request;
  std::uint64_t bufferId = 0;
  std::int64_t numRows = 0;
  std::vector<std::int64_t> alignedPerExpert;
};

/// A low-latency dispatch whose arguments are sound.
struct LowLatencyDispatchRequest {
  Signature signature;
  LowLatencyDispatchInputs inputs;
  LowLatencyDispatchOptions options;
  LowLatencyDispatchOutputs outputs;
  CallOptions call;
  std::shared_ptr<const ExpertPlacement> placement;
};

/// A low-latency combine whose arguments are sound.
struct LowLatencyCombineRequest {
  Signature signature;
  LowLatencyCombineInputs inputs;
  LowLatencyCombineOptions options;
  LowLatencyCombineOutputs outputs;
  CallOptions call;
  std::shared_ptr<const LowLatencyState> handle;
};

/// A low-latency operation between its two phases. Backends derive theirs.
struct ReceiveState {
  ReceiveState() = default;
  ReceiveState(const ReceiveState&) = delete;
  ReceiveState& operator=(const ReceiveState&) = delete;
  virtual ~ReceiveState() = default;

  std::uint64_t bufferId = 0;
  bool received = false;
  std::shared_ptr<LowLatencyState> handle;  ///< of a dispatch
};

enum class MemoryKind { arena, local };

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  /// Orders what follows, until endCall(), behind what the call is ordered by.
  virtual void beginCall(const CallOptions& call) = 0;
  /// Orders what the caller does next behind the call, if that is asked for.
  virtual void endCall(const CallOptions& call) = 0;
  /// Finds out where the tokens of a dispatch go. Throws InvalidArgument for ids out of range.
  virtual void examineRouting(DispatchRequest& request) = 0;
  virtual void getDispatchLayout(const TensorView& topkIdx, const ExpertPlacement& placement,
                                 const LayoutOutputs& outputs) = 0;
  virtual std::unique_ptr<PendingState> beginDispatch(DispatchRequest request) = 0;
  virtual DispatchHandle finishDispatch(PendingState& pending, const DispatchOutputs& outputs) = 0;
  /// Ends a dispatch that has begun and cannot be finished.
  virtual void abandonDispatch(PendingState& pending, std::string_view why) = 0;
  virtual void combine(const CombineRequest& request) = 0;
  virtual std::shared_ptr<ReceiveState> lowLatencyDispatch(LowLatencyDispatchRequest request) = 0;
  virtual std::shared_ptr<ReceiveState> lowLatencyCombine(LowLatencyCombineRequest request) = 0;
  virtual void receive(ReceiveState& state) = 0;
  virtual void refuse(Operation operation, std::string_view why) = 0;

  /// To be written by this buffer's operations, or on a stream of the caller's, if one is given.
  virtual Tensor allocate(std::size_t bytes, MemoryKind kind, Stream stream) = 0;
  /// Rows received and rows per local expert, of a handle whose counts only the GPU knows.
  virtual std::vector<std::int64_t> readCounts(const HandleState& handle) = 0;
  /// Of Buffer::timePush().
  virtual std::vector<double> timePush(std::size_t bytes, int numSms, int repeats) = 0;
  /// The caller uses this buffer's memory on a stream.
  virtual void recordStream(Stream stream) = 0;
  /// It does so no more, and the stream may end.
  virtual void forgetStream(Stream stream) = 0;
  /// On which rows are moved; none on the CPU.
  virtual Stream commStream() const { return {}; }
  /// Throws what a call before could not.
  virtual void check() = 0;
  virtual bool masked(int rank) = 0;
  virtual void setMask(int rank, bool masked) = 0;
  /// Writes to int32 memory of the caller's: of the host, or on a stream to that of the GPU.
  virtual void store(const TensorView& out, const std::vector<std::int32_t>& values,
                     Stream stream) = 0;
  virtual void freeze() = 0;
  virtual BufferStats stats() = 0;
  virtual void destroy() = 0;
};

/// What a rank tells the others while they connect.
struct Admission {
  std::string refusal;      ///< why this rank cannot take part; empty if it can
  std::string fingerprint;  ///< of the options on which ranks must agree
};

/// Lets the ranks that connect know that this one cannot, and returns.
void declineToConnect(Bootstrap& bootstrap, std::string_view why);

/// Connects the ranks. `options` are checked, with the defaults that do not depend on other ranks
/// filled in; the backend fills in the others.
std::shared_ptr<Backend> makeCpuBackend(Bootstrap& bootstrap, const Admission& admission,
                                        BufferOptions& options, std::uint64_t bufferId);
std::shared_ptr<Backend> makeCudaBackend(Bootstrap& bootstrap, const Admission& admission,
                                         BufferOptions& options, std::uint64_t bufferId);

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_CORE_BACKEND_HPP_
