// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_BUFFER_HPP_
#define MSCCLPP_EP_BUFFER_HPP_

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "mscclpp_ep/bootstrap.hpp"
#include "mscclpp_ep/export.hpp"
#include "mscclpp_ep/handle.hpp"
#include "mscclpp_ep/low_latency.hpp"
#include "mscclpp_ep/options.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {

/// The collective operations; each call of one takes the next epoch on every rank.
enum class Operation : std::uint32_t {
  dispatch = 1,
  cachedDispatch = 2,
  combine = 3,
  lowLatencyDispatch = 4,
  lowLatencyCombine = 5,
};

/// Where the memory of a buffer is.
struct BufferStats {
  std::int64_t arenaBytes = 0;    ///< of all segments, the landing block included
  std::int64_t heldBytes = 0;     ///< of blocks in use by results that live
  std::int64_t landingBytes = 0;  ///< of the landing block
  std::int64_t pooledBytes = 0;   ///< ordinary memory, in use or kept for reuse
  std::int64_t straightRows = 0;  ///< rows received in place so far
  std::int64_t landedRows = 0;    ///< rows received by way of the landing block so far
  std::int64_t pulledRows = 0;    ///< rows that peers could read from the caller's memory so far
  std::int64_t stagedRows = 0;    ///< rows that a combine had to copy for its peers so far
};

/// Dispatch and combine of the tokens of a mixture-of-experts layer over the ranks of a group.
///
/// Collective calls (dispatch, combine, destroy) are made by every rank in the same order. One
/// thread at a time uses a buffer; its results may be used, copied and dropped by any thread.
/// On the CPU a call returns with its outputs complete; on a GPU it is ordered with other work by
/// its CallOptions (no stream given: the legacy default stream), inputs live until it is done,
/// streams live as long as the buffer or until forgetStream(), and
/// what goes wrong on the GPU is thrown by the next call or check(). A graph that was captured of
/// calls is not replayed once the buffer is gone. Calls throw the classes of error.hpp.
class MSCCLPP_EP_API Buffer {
 public:
  /// Connects the ranks of `bootstrap`; collective.
  explicit Buffer(Bootstrap& bootstrap, const BufferOptions& options = {});
  /// Takes part in connecting by refusing it: for callers that find their own arguments wrong. The
  /// constructors of the other ranks throw PeerFailure with the reason.
  static void decline(Bootstrap& bootstrap, std::string_view why);
  Buffer(Buffer&&) noexcept;
  Buffer& operator=(Buffer&&) noexcept;
  /// As leave(), and never throws. Ranks still in an operation with this one throw PeerFailure:
  /// call destroy() first.
  ~Buffer();

  int rank() const;
  int size() const;
  const BufferOptions& options() const;  ///< with defaults filled in

  /// Counts tokens per rank and per expert. Local: no other rank takes part.
  void getDispatchLayout(const TensorView& topkIdx, std::int64_t numExperts,
                         const LayoutOutputs& outputs, const CallOptions& call = {}) const;

  /// Exchanges counts. The inputs must live until the dispatch is finished. On a GPU the counts are
  /// those given, which finishDispatch() verifies, and what it throws may be about them.
  PendingDispatch beginDispatch(const DispatchInputs& inputs, const DispatchOptions& options = {},
                                const CallOptions& call = {});
  /// Repeats the routing of `handle` for other rows; only `x` and `scales` may be given. Finishing
  /// it gives a handle of the same routing.
  PendingDispatch beginCachedDispatch(const DispatchInputs& inputs, const DispatchHandle& handle,
                                      const CallOptions& call = {});
  /// Moves the rows. Consumes `pending`, also if it throws. No other collective operation may come
  /// between the two calls.
  DispatchHandle finishDispatch(PendingDispatch pending, const DispatchOutputs& outputs);

  /// Ends a dispatch that cannot be finished; the other ranks throw PeerFailure with the reason.
  void abandonDispatch(PendingDispatch pending, std::string_view why);

  /// Sums, per token, the rows that `handle`'s dispatch made of it: in float32, the biases first,
  /// then ranks in ascending order, rounded once. Outputs overlap no input.
  void combine(const CombineInputs& inputs, const DispatchHandle& handle,
               const CombineOutputs& outputs, const CallOptions& call = {});

  /// Sends tokens to the ranks of their experts, in low-latency mode. At most two low-latency
  /// operations may be sent and not yet received; receive() completes one.
  PendingReceive lowLatencyDispatch(const LowLatencyDispatchInputs& inputs,
                                    const LowLatencyDispatchOptions& options,
                                    const LowLatencyDispatchOutputs& outputs,
                                    const CallOptions& call = {});
  /// Sends the rows of `handle`'s dispatch back, to be summed by their weights on receive().
  PendingReceive lowLatencyCombine(const LowLatencyCombineInputs& inputs,
                                   const LowLatencyHandle& handle,
                                   const LowLatencyCombineOptions& options,
                                   const LowLatencyCombineOutputs& outputs,
                                   const CallOptions& call = {});
  /// Fills the outputs. Once only.
  void receive(const PendingReceive& pending);

  /// Takes part in the next collective operation by refusing it: for callers that find their own
  /// arguments wrong before they can call the operation. The other ranks throw PeerFailure.
  void refuse(Operation operation, std::string_view why);

  /// Memory for rows. In the arena if it has room or can grow, else recycled ordinary memory.
  /// On a GPU it may be written to on `stream`, if that is given, else by operations of this buffer
  /// and what comes after them.
  Tensor empty(std::span<const std::int64_t> shape, DataType dtype, Stream stream = {});
  Tensor empty(std::initializer_list<std::int64_t> shape, DataType dtype, Stream stream = {});
  /// Recycled ordinary memory: for outputs that no peer writes.
  Tensor emptyLocal(std::span<const std::int64_t> shape, DataType dtype);

  /// {rows received, rows per local expert, not rounded …} of a handle of this buffer's. Waits for
  /// the dispatch if only the GPU knows them.
  std::vector<std::int64_t> readCounts(const DispatchHandle& handle) const;

  /// Throws what was noticed since the last call without a call to throw it from: rows dropped
  /// because `numWorstTokens` was too small, ids out of range on a GPU, or the error that ended the
  /// buffer. On a GPU it waits for the operations before.
  void check();
  /// From now on the arena does not grow: results that find no room take the landing block, which
  /// is made large enough for the largest operation so far. A larger one is refused.
  void freeze();
  BufferStats stats() const;

  /// Whether this rank goes on without `rank`, as `BufferOptions::enableShrink` lets it.
  /// On a GPU it waits for the operations before, by which ranks may be lost.
  bool masked(int rank) const;
  /// Fills int32 [R] with 1 for each masked rank and 0 for others. Memory of the buffer's GPU is
  /// written on `stream`.
  void queryMasks(const TensorView& status, Stream stream = {});
  /// Masks another rank, or takes it in again, on this rank only. Throws PeerFailure for a rank
  /// that is gone and is to be taken in.
  void setMask(int rank, bool masked);

  /// Waits, within the timeout, until no peer uses this rank's memory any more, and lets go of it;
  /// results stay valid. Collective; calling it again does nothing.
  void destroy();
  /// Lets go without waiting for calls of other ranks: for a rank that cannot come to destroy(). On
  /// a GPU the operations of a buffer that has not failed have up to 5 seconds to end, or half of
  /// the timeout if that is less, as they are those of other ranks as well; replays of graphs have,
  /// on streams that calls or recordStream() were given.
  void leave() noexcept;
  bool destroyed() const;

  /// Tells that memory of this buffer's is used on a stream, which no call has been given: it is
  /// used again, when it has been dropped, behind what is on that stream then.
  void recordStream(Stream stream);
  /// Before a stream is destroyed that was given to this buffer: what is on it now is waited for
  /// by the buffer's stream.
  void forgetStream(Stream stream);

  /// Measures the way to other ranks' memory: each rank writes `bytes` to memory of the next one,
  /// all at once, by the kernel that dispatches. Returns the seconds of each of `repeats`.
  /// Collective. Throws NotBuilt on the CPU.
  std::vector<double> timePush(std::size_t bytes, int numSms, int repeats);

  /// The stream on which rows are moved on a GPU; none on the CPU. It is there to make events on:
  /// what callers put on it does not come before their calls.
  Stream commStream() const;

 private:
  class MSCCLPP_EP_LOCAL Impl;
  MSCCLPP_EP_LOCAL Impl& impl() const;  ///< throws InvalidArgument if this was moved from
  std::unique_ptr<Impl> impl_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_BUFFER_HPP_
