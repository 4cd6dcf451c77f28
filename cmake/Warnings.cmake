# mscclpp_ep_warnings: the warnings of our own sources. Never linked publicly, so that they reach
# no consumer; they become errors in the presets (CMAKE_COMPILE_WARNING_AS_ERROR).

add_library(mscclpp_ep_warnings INTERFACE)
target_compile_options(
  mscclpp_ep_warnings
  INTERFACE -Wall
            -Wextra
            -Wpedantic
            -Wshadow
            -Wnon-virtual-dtor
            -Woverloaded-virtual
            -Wextra-semi
            -Wundef)
