// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include "cuda/link_pace.hpp"

namespace mscclpp_ep::cuda {
namespace {

TEST_CASE("Rows keep to a pace on links that are known") {
  constexpr int kHopper = 90;
  CHECK(nanosecondsToCross(365000, kHopper) == doctest::Approx(1000.0));
  CHECK(nanosecondsToCross(0, kHopper) == 0.0F);
  // Links of other generations may be faster.
  CHECK(nanosecondsToCross(365000, 80) == 0.0F);
  CHECK(nanosecondsToCross(365000, 100) == 0.0F);
}

}  // namespace
}  // namespace mscclpp_ep::cuda
