// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

#include "mscclpp_ep/error.hpp"
#include "transport/memory_limit.hpp"

namespace mscclpp_ep {
namespace {

namespace fs = std::filesystem;

/// A folder that stands for the root of a machine.
class FakeRoot {
 public:
  FakeRoot() {
    std::string name = (fs::temp_directory_path() / "mscclpp_ep_root_XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  FakeRoot(const FakeRoot&) = delete;
  FakeRoot& operator=(const FakeRoot&) = delete;
  ~FakeRoot() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }

  void write(const std::string& name, const std::string& text) const {
    fs::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name) << text;
  }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();

TEST_CASE("MemAvailable is read in kibibytes") {
  const char* const text =
      "MemTotal:       24684084 kB\nMemFree:        23897300 kB\nMemAvailable:   24292120 kB\n";
  CHECK(parseMemAvailable(text) == 24292120LL * 1024);
  CHECK(parseMemAvailable("MemTotal: 5 kB\n") == std::nullopt);
  CHECK(parseMemAvailable("MemAvailable: many\n") == std::nullopt);
  CHECK(parseMemAvailable("") == std::nullopt);
}

TEST_CASE("the control groups of a process") {
  const ControlGroups second = parseControlGroups("0::/user.slice/a:b\n");
  CHECK(second.unified == "/user.slice/a:b");
  CHECK(second.memory.empty());
  CHECK(second.cpu.empty());
  const ControlGroups first = parseControlGroups(
      "9:name=systemd:/s\n5:cpuset:/wrong\n4:memory:/m/n\n2:cpuacct,cpu:/c\n0::/");
  CHECK(first.unified == "/");
  CHECK(first.memory == "/m/n");
  CHECK(first.cpu == "/c");
  CHECK(parseControlGroups("no colons").unified.empty());
}

TEST_CASE("a statistic is found by its whole name") {
  const char* const text = "total_inactive_file 7\ninactive_file 42\nempty\n";
  CHECK(parseStat(text, "inactive_file") == 42);
  CHECK(parseStat(text, "total_inactive_file") == 7);
  CHECK(parseStat(text, "file") == std::nullopt);
  CHECK(parseStat(text, "empty") == std::nullopt);
}

TEST_CASE("a quota is rounded up to whole cores") {
  CHECK(parseCpuQuota("200000 100000\n") == 2);
  CHECK(parseCpuQuota("200001 100000\n") == 3);
  CHECK(parseCpuQuota("1000 100000\n") == 1);
  CHECK(parseCpuQuota("max 100000\n") == std::nullopt);
  CHECK(parseCpuQuota("-1\n 100000\n") == std::nullopt);
  CHECK(parseCpuQuota("100 0") == std::nullopt);
  CHECK(parseCpuQuota("") == std::nullopt);
}

TEST_CASE("without control groups the machine is the limit") {
  const FakeRoot root;
  CHECK(memoryLimit(root.path()).bytes == kUnlimited);
  root.write("proc/meminfo", "MemAvailable: 4 kB\n");
  const MemoryLimit limit = memoryLimit(root.path());
  CHECK(limit.bytes == 4096);
  CHECK(limit.limitedBy == "the machine (MemAvailable in /proc/meminfo)");
  CHECK(cpuQuota(root.path()) == std::nullopt);
}

TEST_CASE("version 2: the tightest level counts, and what can be reclaimed is free") {
  const FakeRoot root;
  const std::string mount = "sys/fs/cgroup/";
  root.write("proc/meminfo", "MemAvailable: 1000 kB\n");
  root.write("proc/self/cgroup", "0::/outer/inner\n");
  root.write(mount + "outer/inner/memory.max", "max\n");
  root.write(mount + "outer/inner/memory.current", "100\n");
  CHECK(memoryLimit(root.path()).bytes == 1000 * 1024);

  root.write(mount + "outer/memory.max", "5000\n");
  root.write(mount + "outer/memory.current", "3000\n");
  root.write(mount + "outer/memory.stat", "anon 1\ninactive_file 700\nactive_file 9\n");
  CHECK(memoryLimit(root.path()).bytes == 2700);
  CHECK(memoryLimit(root.path()).limitedBy == root.path() / (mount + "outer/memory.max"));

  root.write(mount + "outer/inner/memory.max", "101\n");
  CHECK(memoryLimit(root.path()).bytes == 1);
  root.write(mount + "outer/inner/memory.max", "99\n");
  CHECK(memoryLimit(root.path()).bytes == 0);
}

TEST_CASE("version 1: its own names, and the root of the mount") {
  const FakeRoot root;
  const std::string mount = "sys/fs/cgroup/memory/";
  root.write("proc/meminfo", "MemAvailable: 1000 kB\n");
  root.write("proc/self/cgroup", "4:memory:/docker/abc\n0::/\n");
  root.write(mount + "memory.limit_in_bytes", "9223372036854771712\n");
  root.write(mount + "memory.usage_in_bytes", "123\n");
  CHECK(memoryLimit(root.path()).bytes == 1000 * 1024);
  // A container sees its own group at the mount, under a name that is the host's.
  root.write(mount + "memory.limit_in_bytes", "6000\n");
  root.write(mount + "memory.usage_in_bytes", "5000\n");
  root.write(mount + "memory.stat", "inactive_file 1\ntotal_inactive_file 20\n");
  CHECK(memoryLimit(root.path()).bytes == 1020);
}

TEST_CASE("cores of both versions, the tightest level") {
  const FakeRoot root;
  root.write("proc/self/cgroup", "0::/a/b\n");
  root.write("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  CHECK(cpuQuota(root.path()) == std::nullopt);
  root.write("sys/fs/cgroup/a/cpu.max", "250000 100000\n");
  CHECK(cpuQuota(root.path()) == 3);

  root.write("proc/self/cgroup", "2:cpu,cpuacct:/x\n");
  CHECK(cpuQuota(root.path()) == std::nullopt);
  root.write("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us", "150000\n");
  root.write("sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us", "50000\n");
  CHECK(cpuQuota(root.path()) == 3);
  root.write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n");
  root.write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "50000\n");
  CHECK(cpuQuota(root.path()) == 2);
}

TEST_CASE("a group's name cannot lead out of the mount") {
  const FakeRoot root;
  root.write("proc/self/cgroup", "0::/../../a\n");
  root.write("sys/fs/cgroup/b/memory.max", "max\n");
  root.write("sys/a/memory.max", "5\n");
  root.write("sys/a/memory.current", "1\n");
  CHECK(memoryLimit(root.path()).bytes == kUnlimited);
}

TEST_CASE("this machine") {
  const std::int64_t physical =
      static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
  CHECK(availableMemory() > 0);
  CHECK(availableMemory() <= physical);
  CHECK_NOTHROW(requireMemory(1, "a test"));
  try {
    requireMemory(kUnlimited, "a test");
    FAIL("nobody has so much memory");
  } catch (const SystemError& error) {
    const std::string message = error.what();
    CAPTURE(message);
    CHECK(message.starts_with("a test needs 9223372036854775807 bytes of memory, but only "));
    CHECK(message.find(" are available; the limit is ") != std::string::npos);
  }
}

TEST_CASE("cores follow the affinity of the thread") {
  const int before = coresAvailable();
  CHECK(before >= 1);
  CHECK(before <= static_cast<int>(std::thread::hardware_concurrency()));
  int pinned = 0;
  std::thread([&] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<std::size_t>(::sched_getcpu()), &one);
    if (::sched_setaffinity(0, sizeof(one), &one) == 0) pinned = coresAvailable();
  }).join();
  CHECK(pinned == 1);
}

}  // namespace
}  // namespace mscclpp_ep
