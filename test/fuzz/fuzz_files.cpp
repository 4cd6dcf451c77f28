// SPDX-License-Identifier: MIT
// Files of other ranks, or of earlier runs, at the path of a file bootstrap.
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "core/check.hpp"
#include "mscclpp_ep/bootstrap.hpp"
#include "support/input.hpp"

namespace mscclpp_ep::fuzz {
namespace {

namespace fs = std::filesystem;

/// A folder for this process, removed at its end.
struct Folder {
  Folder() {
    std::string name = (fs::temp_directory_path() / "mscclpp_ep_fuzz_XXXXXX").string();
    must(::mkdtemp(name.data()) != nullptr, "a temporary folder can be made");
    path = name;
  }
  ~Folder() { clear(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  static void clear(const fs::path& path) {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }

  fs::path path;
};

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// Appears whole, as the files of a rank do.
void write(const fs::path& path, const std::string& text) {
  const fs::path temporary = path.string() + ".t";
  std::ofstream(temporary, std::ios::binary) << text;
  std::error_code ignored;
  fs::rename(temporary, path, ignored);
}

/// What rank 0 would publish, damaged: rank 1 waits for it.
void lead(const fs::path& prefix, Input& input) {
  std::string nonce;
  for (int i = 0; i < 20 && nonce.empty(); ++i) {
    nonce = read(prefix.string() + ".hello.1");
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  std::string id = "0123456789abcdef0123456789abcdef";
  if (input.flag()) id = input.text(static_cast<std::size_t>(input.upTo(40)));
  const std::string acknowledged = input.flag() ? " 1" : input.text(2);
  std::string roster = id + "\n" + std::string(32, 'a') + " 1\n" + nonce + acknowledged;
  roster += input.text(static_cast<std::size_t>(input.upTo(80)));
  if (id.find('/') == std::string::npos) {  // the gather that follows, given or refused
    write(prefix.string() + "." + id + ".0.0", input.text(static_cast<std::size_t>(input.upTo(9))));
    if (input.flag()) write(prefix.string() + "." + id + ".failed", input.text(8));
  }
  write(prefix.string() + ".roster", roster);
}

void meet(Input& input) {
  static const Folder folder;
  const fs::path inside = folder.path / "group";
  fs::create_directories(inside);
  const fs::path prefix = inside / "run";
  const int rank = static_cast<int>(input.upTo(1));
  const int stale = static_cast<int>(input.upTo(3));
  for (int i = 0; i < stale; ++i) {
    const char* names[] = {".hello.1", ".ack.1", ".roster", ".hello.0"};
    write(prefix.string() + names[input.upTo(3)],
          input.text(static_cast<std::size_t>(input.upTo(70))));
  }
  std::thread other;
  if (rank == 1) other = std::thread([&] { lead(prefix, input); });
  endsTyped([&] {
    const auto bootstrap =
        makeFileBootstrap(prefix.string(), rank, 2, std::chrono::milliseconds(8));
    bootstrap->allGather({});
  });
  if (other.joinable()) other.join();
  std::size_t outside = 0;
  for (const auto& entry : fs::directory_iterator(folder.path)) outside += entry.exists() ? 1 : 0;
  Folder::clear(inside);
  must(outside == 1, "no file is made beside the path");
}

}  // namespace
}  // namespace mscclpp_ep::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep::fuzz;
  Input input(data, size);
  meet(input);
  return 0;
}
