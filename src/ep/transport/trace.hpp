// SPDX-License-Identifier: MIT
// Records when a rank did what, in a file that chrome://tracing and ui.perfetto.dev show.
#ifndef MSCCLPP_EP_TRANSPORT_TRACE_HPP_
#define MSCCLPP_EP_TRANSPORT_TRACE_HPP_

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "transport/file_descriptor.hpp"

namespace mscclpp_ep {

/// Appends the operations of one rank, each with its phases, to a file in the JSON array format of
/// Chrome, whose closing bracket may be missing. Ranks of a host may share the file, as each writes
/// an operation at once; their clocks agree. One thread at a time uses it.
class Trace {
 public:
  using Clock = std::chrono::steady_clock;

  Trace() = default;  ///< off
  /// Events of `track`, a number of this process's own, which is named after the rank. A trace that
  /// is there already is continued. Throws InvalidArgument if the file cannot be.
  Trace(const std::string& path, int rank, int size, std::uint64_t track);
  ~Trace() { endOperation(); }
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  bool on() const { return static_cast<bool>(file_); }

  void beginOperation(const char* name, std::uint64_t epoch) noexcept;
  /// Writes the operation that has begun, if one has.
  void endOperation() noexcept;
  /// A part of the operation; `name` is a literal.
  void add(const char* name, Clock::time_point begin, Clock::time_point end) noexcept;

 private:
  struct Event {
    const char* name;
    Clock::time_point begin;
    Clock::time_point end;
  };

  std::string text(const Event& event) const;
  void append(const std::string& lines) noexcept;

  FileDescriptor file_;
  pid_t process_ = 0;
  std::uint64_t track_ = 0;
  std::uint64_t epoch_ = 0;
  const char* operation_ = nullptr;
  Clock::time_point began_;
  std::vector<Event> events_;
};

/// Adds a phase that lasts as long as this object. Costs a branch if the trace is off.
class TraceScope {
 public:
  TraceScope(Trace& trace, const char* name) : trace_(trace), name_(name) {
    if (trace_.on()) begin_ = Trace::Clock::now();
  }
  ~TraceScope() {
    if (trace_.on()) trace_.add(name_, begin_, Trace::Clock::now());
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  Trace& trace_;
  const char* name_;
  Trace::Clock::time_point begin_;
};

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_TRACE_HPP_
