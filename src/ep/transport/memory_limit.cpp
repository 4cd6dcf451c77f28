// SPDX-License-Identifier: MIT
#include "transport/memory_limit.hpp"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

#include "core/check.hpp"

namespace mscclpp_ep {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();
constexpr std::string_view kSpace = " \t\n";

/// Takes what comes before `separator` (or everything) off the front of `text`.
std::string_view takeUntil(std::string_view& text, char separator) {
  const std::string_view taken = text.substr(0, text.find(separator));
  text.remove_prefix(std::min(taken.size() + 1, text.size()));
  return taken;
}

std::string_view takeWord(std::string_view& text) {
  text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  const std::string_view word = text.substr(0, text.find_first_of(kSpace));
  text.remove_prefix(word.size());
  return word;
}

/// Nothing if the number is negative, which stands for no limit.
std::optional<std::int64_t> parseNumber(std::string_view text) {
  std::string_view rest = text;
  const std::string_view word = takeWord(rest);
  std::int64_t value = 0;
  if (word.starts_with('-')) return std::nullopt;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error == std::errc::result_out_of_range) return kUnlimited;
  if (error != std::errc{} || end != word.data() + word.size()) return std::nullopt;
  return value;
}

/// Empty if the file is not there or cannot be read.
std::string readText(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

/// The folders of `group` and of all groups around it, up to `mount`. A container that sees the
/// host's names has only some of them; its own group is then at `mount`.
std::vector<fs::path> levels(const fs::path& mount, const std::string& group) {
  std::vector<fs::path> found;
  if (group.empty()) return found;
  fs::path relative = fs::path(group).lexically_normal().relative_path();
  while (true) {
    found.push_back(relative.empty() ? mount : mount / relative);
    if (relative.empty()) return found;
    relative = relative.parent_path();
  }
}

/// How the two versions of control groups name the same things.
struct MemoryFiles {
  const char* limit;
  const char* usage;
  const char* reclaimable;  // a key of memory.stat
};
constexpr MemoryFiles kVersion1{"memory.limit_in_bytes", "memory.usage_in_bytes",
                                "total_inactive_file"};
constexpr MemoryFiles kVersion2{"memory.max", "memory.current", "inactive_file"};

void applyMemoryGroup(const fs::path& folder, const MemoryFiles& files, MemoryLimit& tightest) {
  const auto limit = parseNumber(readText(folder / files.limit));
  const auto usage = parseNumber(readText(folder / files.usage));
  if (!limit || !usage) return;  // "max", or no such file
  const std::int64_t reclaimable =
      parseStat(readText(folder / "memory.stat"), files.reclaimable).value_or(0);
  const std::int64_t used = std::max<std::int64_t>(*usage - reclaimable, 0);
  const std::int64_t left = std::max<std::int64_t>(*limit - used, 0);
  if (left < tightest.bytes) tightest = {left, (folder / files.limit).string()};
}

void applyQuota(const std::string& text, std::optional<int>& tightest) {
  const auto quota = parseCpuQuota(text);
  if (quota && (!tightest || *quota < *tightest)) tightest = quota;
}

int coresOfAffinity() {
  // The kernel refuses a mask smaller than its own.
  for (std::size_t masks = 1; masks <= 64; masks *= 2) {
    std::vector<cpu_set_t> set(masks);
    const std::size_t bytes = masks * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, set.data()) == 0) return CPU_COUNT_S(bytes, set.data());
  }
  return 1;
}

}  // namespace

std::optional<std::int64_t> parseMemAvailable(std::string_view meminfo) {
  const auto kibibytes = parseStat(meminfo, "MemAvailable:");
  if (!kibibytes) return std::nullopt;
  return *kibibytes > kUnlimited / 1024 ? kUnlimited : *kibibytes * 1024;
}

ControlGroups parseControlGroups(std::string_view text) {
  ControlGroups groups;
  while (!text.empty()) {
    std::string_view path = takeUntil(text, '\n');  // "4:cpu,cpuacct:/path"
    const std::string_view hierarchy = takeUntil(path, ':');
    std::string_view controllers = takeUntil(path, ':');
    if (hierarchy == "0" && controllers.empty()) groups.unified = path;
    while (!controllers.empty()) {
      const std::string_view controller = takeUntil(controllers, ',');
      if (controller == "memory") groups.memory = path;
      if (controller == "cpu") groups.cpu = path;
    }
  }
  return groups;
}

std::optional<std::int64_t> parseStat(std::string_view text, std::string_view key) {
  while (!text.empty()) {
    std::string_view line = takeUntil(text, '\n');
    if (takeWord(line) == key) return parseNumber(line);
  }
  return std::nullopt;
}

std::optional<int> parseCpuQuota(std::string_view text) {
  const auto quota = parseNumber(takeWord(text));
  const auto period = parseNumber(takeWord(text));
  if (!quota || !period || *quota <= 0 || *period <= 0) return std::nullopt;
  const std::int64_t cores = *quota / *period + (*quota % *period != 0 ? 1 : 0);
  return static_cast<int>(std::min<std::int64_t>(cores, std::numeric_limits<int>::max()));
}

MemoryLimit memoryLimit(const fs::path& root) {
  MemoryLimit tightest{kUnlimited, "nothing known"};
  if (const auto available = parseMemAvailable(readText(root / "proc/meminfo"))) {
    tightest = {*available, "the machine (MemAvailable in /proc/meminfo)"};
  }
  const ControlGroups groups = parseControlGroups(readText(root / "proc/self/cgroup"));
  const fs::path mount = root / "sys/fs/cgroup";
  for (const fs::path& folder : levels(mount, groups.unified)) {
    applyMemoryGroup(folder, kVersion2, tightest);
  }
  for (const fs::path& folder : levels(mount / "memory", groups.memory)) {
    applyMemoryGroup(folder, kVersion1, tightest);
  }
  return tightest;
}

std::optional<int> cpuQuota(const fs::path& root) {
  std::optional<int> tightest;
  const ControlGroups groups = parseControlGroups(readText(root / "proc/self/cgroup"));
  const fs::path mount = root / "sys/fs/cgroup";
  for (const fs::path& folder : levels(mount, groups.unified)) {
    applyQuota(readText(folder / "cpu.max"), tightest);
  }
  for (const char* name : {"cpu", "cpu,cpuacct"}) {
    for (const fs::path& folder : levels(mount / name, groups.cpu)) {
      const std::string quota = readText(folder / "cpu.cfs_quota_us");
      applyQuota(cat(quota, " ", readText(folder / "cpu.cfs_period_us")), tightest);
    }
  }
  return tightest;
}

std::int64_t availableMemory() { return memoryLimit().bytes; }

void requireMemory(std::int64_t bytes, std::string_view what) {
  const MemoryLimit limit = memoryLimit();
  if (bytes <= limit.bytes) return;
  throw SystemError(cat(what, " needs ", bytes, " bytes of memory, but only ", limit.bytes,
                        " are available; the limit is ", limit.limitedBy,
                        ". Ask for less, or raise the limit"));
}

int coresAvailable() {
  const int cores = coresOfAffinity();
  return std::max(1, std::min(cores, cpuQuota().value_or(cores)));
}

}  // namespace mscclpp_ep
