# mscclpp_ep_warnings: the warnings of our own sources. Never linked publicly, so that they reach
# no consumer; they become errors in the presets (CMAKE_COMPILE_WARNING_AS_ERROR).

add_library(mscclpp_ep_warnings INTERFACE)
target_compile_options(
  mscclpp_ep_warnings
  INTERFACE # nvcc's own code of a kernel's launch is not pedantic.
            $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>
            $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wnon-virtual-dtor>
            $<$<COMPILE_LANGUAGE:CXX>:-Woverloaded-virtual;-Wextra-semi;-Wundef>)
