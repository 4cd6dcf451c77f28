# mscclpp_ep_sanitizers: the flags of MSCCLPP_EP_SANITIZE, for everything this project compiles.

add_library(mscclpp_ep_sanitizers INTERFACE)

if(MSCCLPP_EP_SANITIZE)
  foreach(sanitizer IN LISTS MSCCLPP_EP_SANITIZE)
    if(NOT sanitizer MATCHES "^(address|undefined|thread)$")
      message(FATAL_ERROR "MSCCLPP_EP_SANITIZE has '${sanitizer}'; allowed are address, undefined "
                          "and thread.")
    endif()
  endforeach()
  if("thread" IN_LIST MSCCLPP_EP_SANITIZE AND "address" IN_LIST MSCCLPP_EP_SANITIZE)
    message(FATAL_ERROR "MSCCLPP_EP_SANITIZE: thread and address exclude each other.")
  endif()

  list(JOIN MSCCLPP_EP_SANITIZE "," mscclpp_ep_sanitize_flag)
  target_compile_options(
    mscclpp_ep_sanitizers INTERFACE -fsanitize=${mscclpp_ep_sanitize_flag}
                                    -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(mscclpp_ep_sanitizers INTERFACE -fsanitize=${mscclpp_ep_sanitize_flag})
  if("thread" IN_LIST MSCCLPP_EP_SANITIZE AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC says that it does not model fences; the protocol orders by operations when it is checked.
    target_compile_options(mscclpp_ep_sanitizers INTERFACE -Wno-tsan)
  endif()
endif()

if(MSCCLPP_EP_BUILD_FUZZERS)
  # The fuzzer sees which branches of the library an input reaches.
  target_compile_options(mscclpp_ep_sanitizers INTERFACE -fsanitize=fuzzer-no-link)
  target_link_options(mscclpp_ep_sanitizers INTERFACE -fsanitize=fuzzer-no-link)
endif()
