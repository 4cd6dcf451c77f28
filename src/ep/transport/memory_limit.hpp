// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_TRANSPORT_MEMORY_LIMIT_HPP_
#define MSCCLPP_EP_TRANSPORT_MEMORY_LIMIT_HPP_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

namespace mscclpp_ep {

/// How much memory there is to take, and what sets the limit ("the machine", a control group).
struct MemoryLimit {
  std::int64_t bytes = 0;
  std::string limitedBy;
};

/// Where this process is in the trees of control groups; empty where it is in none.
struct ControlGroups {
  std::string unified;  ///< version 2
  std::string memory;   ///< version 1
  std::string cpu;      ///< version 1
};

/// "MemAvailable" of the text of /proc/meminfo, in bytes.
std::optional<std::int64_t> parseMemAvailable(std::string_view meminfo);
/// The text of /proc/self/cgroup.
ControlGroups parseControlGroups(std::string_view text);
/// The value of a line "key value" in a text of such lines, as memory.stat is.
std::optional<std::int64_t> parseStat(std::string_view text, std::string_view key);
/// The least whole number of cores that "quota period" allows; nothing if "max" or negative.
std::optional<int> parseCpuQuota(std::string_view text);

/// The tightest limit under `root`, in which proc/ and sys/ are looked for. A process without any
/// limit that can be read gets the largest number.
MemoryLimit memoryLimit(const std::filesystem::path& root = "/");
/// The tightest quota of cores under `root`, if there is one.
std::optional<int> cpuQuota(const std::filesystem::path& root = "/");

/// Bytes that this process can take before the machine or one of its control groups runs out.
std::int64_t availableMemory();

/// Throws SystemError unless `bytes` are available for `what`. A shared-memory file that is too
/// large is granted, and kills the process later, when its pages are touched.
void requireMemory(std::int64_t bytes, std::string_view what);

/// Cores that this process may keep busy: its affinity and its control group's quota. At least 1.
int coresAvailable();

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_TRANSPORT_MEMORY_LIMIT_HPP_
