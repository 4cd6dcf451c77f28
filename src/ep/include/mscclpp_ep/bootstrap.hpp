// SPDX-License-Identifier: MIT
#ifndef MSCCLPP_EP_BOOTSTRAP_HPP_
#define MSCCLPP_EP_BOOTSTRAP_HPP_

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "mscclpp_ep/export.hpp"

namespace mscclpp_ep {

/// How ranks find each other before they share memory. Implement it over whatever the program
/// already has (MPI, a store, a socket); a Buffer uses it while it is made, and never again.
class MSCCLPP_EP_API Bootstrap {
 public:
  using Bytes = std::vector<std::byte>;

  virtual ~Bootstrap();
  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// Every rank gives some bytes (their number may differ) and gets those of all, by rank.
  /// Blocks until all have called; it must end by throwing if one never does.
  virtual std::vector<Bytes> allGather(std::span<const std::byte> mine) = 0;

  /// Returns when every rank has called it.
  virtual void barrier();
};

/// Bootstraps for `size` threads of this process, one each.
MSCCLPP_EP_API std::vector<std::shared_ptr<Bootstrap>> makeLocalBootstraps(
    int size, std::chrono::duration<double> timeout = std::chrono::seconds(100));

/// A bootstrap for processes that see the same file system. `path` is a prefix for files which the
/// ranks make and remove; what an earlier run left at the same path is recognised and ignored.
MSCCLPP_EP_API std::shared_ptr<Bootstrap> makeFileBootstrap(
    const std::string& path, int rank, int size,
    std::chrono::duration<double> timeout = std::chrono::seconds(100));

}  // namespace mscclpp_ep

#endif  // MSCCLPP_EP_BOOTSTRAP_HPP_
