// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_OPTIONS_HPP_
#define MSCCLPP_EP_OPTIONS_HPP_

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "mscclpp_ep/event.hpp"
#include "mscclpp_ep/stream.hpp"
#include "mscclpp_ep/tensor.hpp"

namespace mscclpp_ep {

/// How a Buffer is made. Every rank of a group gives the same values, except for `device`'s index,
/// `numThreads`, the arena's sizes, `trace` and `pollInterrupt`.
struct BufferOptions {
  Device device;

  /// Bytes of arena to begin with. A hint on the CPU, which starts at 64 MiB at most and grows.
  std::int64_t arenaBytes = 0;

  /// Most bytes that results held by the caller may take of the arena, and most that one operation
  /// may receive. 0: half of the memory free at construction, divided by the ranks on this host.
  std::int64_t maxArenaBytes = 0;

  /// Longest that any wait lasts before it ends in an error.
  std::chrono::duration<double> timeout = std::chrono::seconds(100);

  /// Threads that move data for this rank, its caller included. 0: cores over ranks on this host.
  int numThreads = 0;

  /// Multiprocessors of a GPU that are left to others, whatever calls ask for.
  int smMargin = 0;

  /// Ranks that share memory. 0: found at run time.
  int ranksPerDomain = 0;

  /// `expertMap[e]` is the rank that holds expert e; its local index is its place among that rank's
  /// experts in order of global id. Empty: contiguous blocks of ceil(E / R).
  std::vector<std::int32_t> expertMap;

  /// Masks a rank that dies, gives up or is waited for longer than `timeout`, and goes on without
  /// it, instead of failing: its rows are missing from results.
  bool enableShrink = false;

  /// Sends a checksum and a tag (source rank, token, epoch) with each row, 16 bytes, and compares
  /// them where it arrives: damage ends the buffer with a PeerFailure that names the row. Rows that
  /// stay on their rank are not checked.
  bool integrityCheck = false;

  /// A file to which this rank appends the phases of each operation, as a trace for
  /// ui.perfetto.dev or chrome://tracing; ranks may share it. Empty: the value of MSCCLPP_EP_TRACE
  /// in the environment, or none.
  std::string trace;

  /// Called about every 50 ms by the thread that waits; what it throws ends the wait, after which
  /// the buffer can only be destroyed.
  std::function<void()> pollInterrupt;

  /// Number of the first operation. Only its low 32 bits are compared, so tests start near 2^32.
  std::uint64_t firstEpoch = 1;
};

/// How one call is ordered with the caller's other work. On a GPU it is done by a stream of the
/// buffer's own (`Buffer::commStream`), and the host does not wait for it, except for the counts of
/// a dispatch that has no `numWorstTokens` and no handle.
struct CallOptions {
  /// The caller's: the call comes after what is on it now, and, unless `async` says otherwise,
  /// before what will be put on it.
  Stream stream;

  /// If given, the call comes after this event only, and not after what is on `stream`.
  std::optional<Event> previous;

  /// Leaves `stream` alone: the caller waits for an `Event` made on `Buffer::commStream` after the
  /// call, before it uses results, or writes over what the call was given.
  bool async = false;

  /// Multiprocessors of the GPU that the call may use; 0: a default. Means nothing on the CPU.
  int numSms = 0;
};

/// Where rows land.
enum class Layout : std::uint8_t {
  tokenMajor,  ///< one row a (source, token), in order of source rank, then source token
};

struct DispatchOptions {
  /// Counts per local expert are rounded up to a multiple of this. Rows are not padded.
  std::int64_t expertAlignment = 1;

  /// If not 0, outputs have this many rows and the counts per expert stay empty. Rows beyond are
  /// dropped from the highest (source, token) and reported by `Buffer::check`.
  std::int64_t numWorstTokens = 0;

  Layout layout = Layout::tokenMajor;
};

/// T tokens of this rank, H elements a token, S scales a token, K choices a token, R ranks,
/// E experts. Everything is contiguous but `scales`, whose strides are free.
struct DispatchInputs {
  TensorView x;                   ///< [T, H], any dtype
  TensorView scales;              ///< [T, S], any dtype of 1, 2 or 4 bytes; optional
  TensorView topkIdx;             ///< [T, K] int32 or int64, global ids, -1 for none; optional
  TensorView topkWeights;         ///< [T, K] float32; given if and only if topkIdx is
  TensorView isTokenInRank;       ///< [T, R] bool
  TensorView numTokensPerRank;    ///< [R] int32: the column sums of isTokenInRank
  TensorView numTokensPerExpert;  ///< [E] int32
};

/// N rows are received, or room for `numWorstTokens`. In arena memory (`Buffer::empty`) rows arrive
/// in place; in any other they are copied to it.
struct DispatchOutputs {
  TensorView x;            ///< [N, H]
  TensorView scales;       ///< [N, S], contiguous; if scales were sent
  TensorView topkIdx;      ///< [N, K], local ids, -1 elsewhere; if top-k was sent
  TensorView topkWeights;  ///< [N, K], 0 where the index is -1; if top-k was sent
};

struct CombineInputs {
  TensorView x;            ///< [N, H] bfloat16, float16 or float32; N rows as dispatch gave
  TensorView topkWeights;  ///< [N, K] float32, summed per token; optional
  TensorView bias0;        ///< [T, H] of x's dtype, added first; optional
  TensorView bias1;        ///< likewise
};

struct CombineOutputs {
  TensorView x;            ///< [T, H] of the input's dtype
  TensorView topkWeights;  ///< [T, K] float32; if weights were given
};

/// What `Buffer::getDispatchLayout` fills in.
struct LayoutOutputs {
  TensorView numTokensPerRank;    ///< [R] int32, each token counted once a rank
  TensorView numTokensPerExpert;  ///< [E] int32, every choice counted
  TensorView isTokenInRank;       ///< [T, R] bool
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_OPTIONS_HPP_
