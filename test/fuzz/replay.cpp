// SPDX-License-Identifier: MIT
// Gives a harness every file of the folders, or the files, that are named: the main of a compiler
// that has no fuzzer.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

// Far more than any input takes, as machines may be busy; a loop without end takes longer.
constexpr std::chrono::seconds kLongest{10};

bool replay(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::printf("%s\n", path.c_str());
  std::fflush(stdout);  // the last line names the input that ended the program
  const auto start = Clock::now();
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  if (Clock::now() - start < kLongest) return true;
  std::printf("it took too long\n");
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<fs::path> files;
  for (int i = 1; i < argc; ++i) {
    if (!fs::is_directory(argv[i])) {
      files.emplace_back(argv[i]);
      continue;
    }
    for (const auto& entry : fs::directory_iterator(argv[i])) files.push_back(entry.path());
  }
  if (files.empty()) {
    std::printf("there is nothing to replay\n");
    return 1;
  }
  bool passed = true;
  for (const fs::path& file : files) passed = replay(file) && passed;
  return passed ? 0 : 1;
}
