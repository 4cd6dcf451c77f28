// SPDX-License-Identifier: MIT
// What another process says while ranks connect: its card, its greeting, its announcements.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "mscclpp_ep/bootstrap.hpp"
#include "support/input.hpp"
#include "transport/shared_memory.hpp"
#include "transport/unix_socket.hpp"

namespace mscclpp_ep::fuzz {
namespace {

constexpr std::size_t kProcessAt = 8;
constexpr std::size_t kSecretAt = 24;
constexpr std::size_t kSecretBytes = 16;

/// The address at which a rank listens that gathers this card.
std::string addressOf(std::span<const std::byte> card) {
  std::string name = "mscclpp_ep.";
  for (std::size_t i = 0; i < kSecretBytes / 2; ++i) {
    const auto byte = std::to_integer<unsigned>(card[kSecretAt + i]);
    name += "0123456789abcdef"[byte >> 4];
    name += "0123456789abcdef"[byte & 15];
  }
  return name;
}

/// Rank 1 as rank 0 sees it: it does everything at the first gather, as it has nothing to wait for.
class Stranger final : public Bootstrap {
 public:
  explicit Stranger(Input& input) : input_(input) {}

  int rank() const override { return 0; }
  int size() const override { return 2; }
  std::vector<Bytes> allGather(std::span<const std::byte> mine) override {
    const Bytes own(mine.begin(), mine.end());
    Bytes card = own;
    if (socket_) {  // the second gather: whether all have connected
      card.assign(static_cast<std::size_t>(input_.upTo(1)), std::byte{0xFF});
      return {own, card};
    }
    card[kProcessAt] ^= std::byte{1};
    input_.damage(card);
    const std::string more = input_.text(static_cast<std::size_t>(input_.upTo(4)));
    for (const char letter : more) card.push_back(static_cast<std::byte>(letter));
    socket_ = connectAbstract(addressOf(own));
    greet(own);
    for (std::int64_t left = input_.upTo(4); left > 0; --left) announce();
    if (input_.flag()) socket_ = FileDescriptor(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    return {own, card};
  }

 private:
  void greet(const Bytes& card) {
    struct {
      std::byte secret[kSecretBytes];
      std::int32_t rank = 1;
    } greeting;
    std::memcpy(greeting.secret, card.data() + kSecretAt, kSecretBytes);
    Bytes bytes = bytesOf(std::as_bytes(std::span(&greeting, 1)));
    input_.damage(bytes);
    if (!bytes.empty()) sendMessage(socket_.get(), bytes, -1);
  }

  void announce() {
    struct {
      std::uint32_t id = 0;
      std::uint32_t reserved = 0;
      std::uint64_t bytes = ControlMap(2).bytes();
    } announcement;
    announcement.id = static_cast<std::uint32_t>(input_.upTo(2));
    FileDescriptor fd;
    if (input_.upTo(4) > 0) {
      fd = FileDescriptor(::memfd_create("fuzz", MFD_CLOEXEC));
      const auto bytes = static_cast<off_t>(
          input_.flag() ? announcement.bytes : static_cast<std::uint64_t>(input_.upTo(9)) * kPage);
      must(::ftruncate(fd.get(), bytes) == 0, "a memory file can be made");
    }
    Bytes bytes = bytesOf(std::as_bytes(std::span(&announcement, 1)));
    input_.damage(bytes);
    if (!bytes.empty()) sendMessage(socket_.get(), bytes, fd.get());
  }

  static Bytes bytesOf(std::span<const std::byte> bytes) { return {bytes.begin(), bytes.end()}; }

  Input& input_;
  FileDescriptor socket_;
};

void connect(Input& input) {
  SharedMemoryOptions options;
  options.connect.timeout = std::chrono::milliseconds(3);
  options.connect.fingerprint = "some options";
  Stranger stranger(input);
  SharedMemory memory(stranger, std::move(options));
  const std::byte* control = memory.control(1);
  must(control[0] == std::byte{0} && control[ControlMap(2).bytes() - 1] == std::byte{0},
       "a control segment is whole");
  const auto offset = input.number();
  const auto bytes = static_cast<std::size_t>(input.number());
  const std::byte* data = memory.peerMemory(1, 1, offset, bytes);
  if (bytes > 0) must(data[0] == std::byte{0} && data[bytes - 1] == std::byte{0}, "it is mapped");
}

}  // namespace
}  // namespace mscclpp_ep::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace mscclpp_ep::fuzz;
  Input input(data, size);
  endsTyped([&] { connect(input); });
  return 0;
}
