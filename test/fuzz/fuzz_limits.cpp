// SPDX-License-Identifier: MIT
// The files in which Linux tells of memory and cores.
#include <filesystem>
#include <fstream>

#include "core/check.hpp"
#include "support/input.hpp"
#include "transport/memory_limit.hpp"

namespace mscclpp_ep::fuzz {
namespace {

namespace fs = std::filesystem;

/// A folder for this process, removed at its end, that looks like the root of a machine.
struct FakeRoot {
  FakeRoot() {
    std::string name = (fs::temp_directory_path() / "mscclpp_ep_fuzz_XXXXXX").string();
    must(::mkdtemp(name.data()) != nullptr, "a temporary folder can be made");
    path = name;
    fs::create_directories(path / "proc/self");
    fs::create_directories(path / "sys/fs/cgroup/memory/a");
    fs::create_directories(path / "sys/fs/cgroup/a");
  }
  ~FakeRoot() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  FakeRoot(const FakeRoot&) = delete;
  FakeRoot& operator=(const FakeRoot&) = delete;

  void write(const char* name, const std::string& text) const {
    std::ofstream(path / name) << text;
  }

  fs::path path;
};

void parseAll(const std::string& text) {
  const auto memory = parseMemAvailable(text);
  must(!memory || *memory >= 0, "no memory is negative");
  parseControlGroups(text);
  parseStat(text, "inactive_file");
  const auto cores = parseCpuQuota(text);
  must(!cores || *cores > 0, "a quota is a core at least");
}

void readAll(Input& input) {
  static const FakeRoot root;
  root.write("proc/meminfo", "MemAvailable: " + input.text(24));
  root.write("proc/self/cgroup", input.flag() ? "0::/a\n1:memory,cpu:/a\n" : input.text(40));
  for (const char* name : {"memory.max", "memory.current", "memory.stat", "cpu.max"}) {
    root.write((std::string("sys/fs/cgroup/a/") + name).c_str(), input.text(24));
  }
  for (const char* name : {"memory.limit_in_bytes", "memory.usage_in_bytes"}) {
    root.write((std::string("sys/fs/cgroup/memory/a/") + name).c_str(), input.text(24));
  }
  must(memoryLimit(root.path).bytes >= 0, "no limit is negative");
  const auto cores = cpuQuota(root.path);
  must(!cores || *cores > 0, "a quota is a core at least");
}

}  // namespace
}  // namespace mscclpp_ep::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep::fuzz;
  Input input(data, size);
  // Files are slow: most inputs go to the parsers alone.
  const bool files = input.take<std::uint8_t>() == 'F';
  endsTyped([&] { files ? readAll(input) : parseAll(input.text()); });
  return 0;
}
