// SPDX-License-Identifier: MIT
#include "transport/trace.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <thread>

#include "core/check.hpp"

namespace mscclpp_ep {

namespace {

constexpr std::chrono::seconds kLockPatience{10};

std::string reason() { return std::system_category().message(errno); }

FileDescriptor openTrace(const std::string& path) {
  EP_EXPECTS(path.find('\0') == std::string::npos, "trace has a zero byte in its name");
  FileDescriptor file(::open(path.c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0666));
  EP_EXPECTS(file, "trace is ", path, ", which cannot be opened: ", reason());
  struct stat status = {};
  EP_EXPECTS(::fstat(file.get(), &status) == 0 && S_ISREG(status.st_mode), "trace is ", path,
             ", which is no regular file");
  return file;
}

/// Holds the file against the other ranks while its beginning is written. Not for longer: appending
/// a whole operation at once needs no lock.
class FileLock {
 public:
  FileLock(int file, const std::string& path) : file_(file) {
    const auto deadline = Trace::Clock::now() + kLockPatience;
    while (::flock(file_, LOCK_EX | LOCK_NB) != 0) {
      EP_EXPECTS(errno == EWOULDBLOCK || errno == EINTR, "trace is ", path,
                 ", which cannot be locked: ", reason());
      EP_EXPECTS(Trace::Clock::now() < deadline, "trace is ", path,
                 ", which another program has locked");
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  ~FileLock() { ::flock(file_, LOCK_UN); }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int file_;
};

bool writeWhole(int file, const std::string& text) {
  return ::write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
}

/// Begins the array, or makes sure that the file has one: no other file is added to.
void beginArray(int file, const std::string& path) {
  char first = 0;
  const ssize_t bytes = ::pread(file, &first, 1, 0);
  EP_EXPECTS(bytes >= 0, "trace is ", path, ", which cannot be read: ", reason());
  if (bytes == 0) {
    EP_EXPECTS(writeWhole(file, "[\n"), "trace is ", path, ", which cannot be written: ", reason());
  } else {
    EP_EXPECTS(first == '[', "trace is ", path, ", which exists and is no trace; give another");
  }
}

/// Microseconds, to the nanosecond.
template <typename Duration>
std::string microseconds(Duration duration) {
  const auto all = std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
  const std::string fraction = cat(1000 + all % 1000);
  return cat(all / 1000, ".", std::string_view(fraction).substr(1));
}

std::string metadata(const char* what, pid_t process, std::uint64_t track,
                     const std::string& argument) {
  return cat("{\"name\":\"", what, "\",\"ph\":\"M\",\"pid\":", process, ",\"tid\":", track,
             ",\"args\":{", argument, "}},\n");
}

}  // namespace

Trace::Trace(const std::string& path, int rank, int size, std::uint64_t track)
    : file_(openTrace(path)), process_(::getpid()), track_(track) {
  const FileLock lock(file_.get(), path);
  beginArray(file_.get(), path);
  const std::string order = cat("\"sort_index\":", rank);
  const std::string lines =
      metadata("process_name", process_, track_, "\"name\":\"mscclpp_ep\"") +
      metadata("process_sort_index", process_, track_, order) +
      metadata("thread_name", process_, track_, cat("\"name\":\"rank ", rank, " of ", size, "\"")) +
      metadata("thread_sort_index", process_, track_, order);
  EP_EXPECTS(writeWhole(file_.get(), lines), "trace is ", path,
             ", which cannot be written: ", reason());
}

void Trace::beginOperation(const char* name, std::uint64_t epoch) noexcept {
  if (!on()) return;
  endOperation();
  operation_ = name;
  epoch_ = epoch;
  began_ = Clock::now();
}

void Trace::add(const char* name, Clock::time_point begin, Clock::time_point end) noexcept {
  if (operation_ == nullptr) return;
  try {
    events_.push_back({name, begin, end});
  } catch (const std::bad_alloc&) {
    // Expected: without memory the phase is left out, and the operation goes on.
  }
}

void Trace::endOperation() noexcept {
  if (operation_ == nullptr) return;
  // A forked child has a copy of what its parent will write.
  if (::getpid() == process_) {
    try {
      events_.push_back({operation_, began_, Clock::now()});
      // Viewers take the outer of two events that begin at once from their order.
      std::sort(events_.begin(), events_.end(), [](const Event& a, const Event& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end > b.end;
      });
      std::string lines;
      for (const Event& event : events_) lines += text(event);
      append(lines);
    } catch (const std::bad_alloc&) {
      // Expected: as in add().
    }
  }
  operation_ = nullptr;
  events_.clear();
}

std::string Trace::text(const Event& event) const {
  return cat("{\"name\":\"", event.name,
             "\",\"ph\":\"X\",\"ts\":", microseconds(event.begin.time_since_epoch()),
             ",\"dur\":", microseconds(event.end - event.begin), ",\"pid\":", process_,
             ",\"tid\":", track_, ",\"args\":{\"epoch\":", epoch_, "}},\n");
}

/// In one call, so that what ranks write is not mixed. A full disk ends the trace, not the work.
void Trace::append(const std::string& lines) noexcept {
  if (!writeWhole(file_.get(), lines)) file_ = FileDescriptor();
}

}  // namespace mscclpp_ep
