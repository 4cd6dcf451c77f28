// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "mscclpp_ep/error.hpp"
#include "support/ranks.hpp"
#include "transport/trace.hpp"

namespace mscclpp_ep {
namespace {

namespace fs = std::filesystem;
using testing::contains;
using testing::errorOf;

/// A folder that goes with its test.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / cat("mscclpp_ep-trace-", ::getpid())) {
    fs::remove_all(path_);
    fs::create_directory(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string file(const char* name) const { return (path_ / name).string(); }

 private:
  fs::path path_;
};

std::vector<std::string> linesOf(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

void write(const std::string& path, const char* text) { std::ofstream(path) << text; }

TEST_CASE("a trace that is off writes nothing") {
  Trace trace;
  CHECK(!trace.on());
  trace.beginOperation("dispatch", 1);
  {
    const TraceScope scope(trace, "entry");
  }
  trace.endOperation();
}

TEST_CASE("an operation is written when it ends, before its phases") {
  const Folder folder;
  const std::string path = folder.file("trace.json");
  Trace trace(path, 1, 4, 7);
  const std::size_t head = linesOf(path).size();
  CHECK(linesOf(path)[0] == "[");
  CHECK(contains(linesOf(path)[3], "rank 1 of 4"));
  trace.beginOperation("combine", 12);
  {
    const TraceScope outer(trace, "outer");
    const TraceScope inner(trace, "inner");
  }
  CHECK(linesOf(path).size() == head);
  trace.endOperation();
  trace.endOperation();
  {
    const TraceScope outside(trace, "outside of an operation");
  }
  const auto lines = linesOf(path);
  REQUIRE(lines.size() == head + 3);
  CHECK(contains(lines[head], "\"combine\",\"ph\":\"X\",\"ts\":"));
  CHECK(contains(lines[head], cat("\"pid\":", ::getpid(), ",\"tid\":7")));
  CHECK(contains(lines[head], "\"epoch\":12"));
  CHECK(contains(lines[head + 1], "outer"));
  CHECK(contains(lines[head + 2], "inner"));
}

TEST_CASE("an operation that never ended is written when the trace goes") {
  const Folder folder;
  const std::string path = folder.file("trace.json");
  {
    Trace trace(path, 0, 1, 1);
    trace.beginOperation("dispatch", 1);
  }
  CHECK(contains(linesOf(path).back(), "dispatch"));
}

TEST_CASE("ranks that open and append at once do not mix their lines") {
  const testing::Watchdog watchdog("ranks that trace");
  const Folder folder;
  const std::string path = folder.file("trace.json");
  constexpr int kRanks = 6;
  constexpr int kOperations = 200;
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank) {
    ranks.emplace_back([&, rank] {
      Trace trace(path, rank, kRanks, static_cast<std::uint64_t>(rank));
      for (int i = 0; i < kOperations; ++i) {
        trace.beginOperation("dispatch", static_cast<std::uint64_t>(i));
        {
          const TraceScope scope(trace, "entry");
        }
        trace.endOperation();
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  const auto lines = linesOf(path);
  CHECK(lines.size() == 1 + kRanks * (4 + 2 * kOperations));
  CHECK(lines[0] == "[");
  for (std::size_t i = 1; i < lines.size(); ++i) {
    const bool whole = lines[i].starts_with("{\"name\":\"") && lines[i].ends_with("}},");
    if (!whole) FAIL_CHECK(lines[i]);
  }
}

TEST_CASE("files that cannot be a trace are refused and stay as they are") {
  const Folder folder;
  const auto refusal = [](const std::string& path) {
    return errorOf<InvalidArgument>([&] { const Trace trace(path, 0, 1, 1); }, path);
  };
  CHECK(contains(refusal(folder.file("nowhere/trace.json")), "cannot be opened: No such file"));
  CHECK(contains(refusal(folder.file("")), "cannot be opened: Is a directory"));
  CHECK(contains(refusal("/dev/null"), "no regular file"));
  CHECK(contains(refusal(std::string("a\0b", 3)), "zero byte"));
  const std::string other = folder.file("thesis.txt");
  write(other, "years of work");
  CHECK(contains(refusal(other), "exists and is no trace"));
  CHECK(linesOf(other) == std::vector<std::string>{"years of work"});
}

TEST_CASE("a trace that is there is continued, also one that was created empty") {
  const Folder folder;
  const std::string path = folder.file("trace.json");
  write(path, "");
  {
    const Trace trace(path, 0, 1, 1);
  }
  const std::size_t lines = linesOf(path).size();
  {
    const Trace trace(path, 0, 1, 2);
  }
  CHECK(linesOf(path).size() == 2 * lines - 1);
}

}  // namespace
}  // namespace mscclpp_ep
