# Every option of the build. All are cached; the README lists them.

option(MSCCLPP_BUILD_EXT_EP "Build libmscclpp_ep at all" ${PROJECT_IS_TOP_LEVEL})
option(MSCCLPP_EP_BUILD_PYTHON "Build the Python extension (pip does; it needs nanobind)" OFF)
option(MSCCLPP_EP_BUILD_TESTS "Build the C++ unit tests (they need doctest)" OFF)
option(MSCCLPP_EP_BUILD_FUZZERS "Build the libFuzzer programs of test/fuzz (they need clang)" OFF)
option(MSCCLPP_EP_BUILD_EXAMPLES "Build the C++ examples" OFF)
set(MSCCLPP_EP_SANITIZE "" CACHE STRING "Sanitizers: empty, 'address;undefined' or 'thread'")
set_property(CACHE MSCCLPP_EP_SANITIZE PROPERTY STRINGS "" "address;undefined" "thread")

# A subproject follows its parent, whose default in CMake is static.
if(PROJECT_IS_TOP_LEVEL)
  option(BUILD_SHARED_LIBS "Build a shared library, not a static one" ON)
endif()

# Defines a three-valued option for a part that this version does not have: AUTO means off, and ON
# is an error rather than a build that silently lacks the part.
function(mscclpp_ep_unavailable_option name part)
  set(${name} AUTO CACHE STRING "${part}: AUTO, ON or OFF")
  set_property(CACHE ${name} PROPERTY STRINGS AUTO ON OFF)
  string(TOUPPER "${${name}}" value)
  if(value STREQUAL "ON")
    message(FATAL_ERROR "${name}=ON, but this version of mscclpp_ep (${PROJECT_VERSION}) has no "
                        "${part} yet. Set ${name} to AUTO or OFF.")
  elseif(NOT value MATCHES "^(AUTO|OFF)$")
    message(FATAL_ERROR "${name} is '${${name}}'; allowed are AUTO, ON and OFF.")
  endif()
endfunction()

set(MSCCLPP_EP_CUDA AUTO CACHE STRING "CUDA backend: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE MSCCLPP_EP_CUDA PROPERTY STRINGS AUTO ON OFF)
mscclpp_ep_unavailable_option(MSCCLPP_EP_MSCCLPP "MSCCL++ engine")
mscclpp_ep_unavailable_option(MSCCLPP_EP_UCX "UCX engine")

if(NOT MSCCLPP_BUILD_EXT_EP)
  foreach(part IN ITEMS PYTHON TESTS EXAMPLES)
    if(MSCCLPP_EP_BUILD_${part})
      message(FATAL_ERROR "MSCCLPP_EP_BUILD_${part} needs MSCCLPP_BUILD_EXT_EP=ON.")
    endif()
  endforeach()
endif()

if(MSCCLPP_EP_BUILD_FUZZERS AND NOT MSCCLPP_EP_BUILD_TESTS)
  message(FATAL_ERROR "MSCCLPP_EP_BUILD_FUZZERS needs MSCCLPP_EP_BUILD_TESTS=ON.")
endif()
if(MSCCLPP_EP_BUILD_FUZZERS AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  message(FATAL_ERROR "MSCCLPP_EP_BUILD_FUZZERS needs clang, which has libFuzzer; the compiler is "
                      "${CMAKE_CXX_COMPILER_ID}. Use the preset 'fuzz', or set CMAKE_CXX_COMPILER.")
endif()

if(MSCCLPP_EP_BUILD_PYTHON AND NOT BUILD_SHARED_LIBS)
  message(FATAL_ERROR "MSCCLPP_EP_BUILD_PYTHON needs BUILD_SHARED_LIBS=ON: the Python package "
                      "ships libmscclpp_ep.so, which C++ programs link as well.")
endif()

# An empty build type would give a library without optimisation.
get_property(mscclpp_ep_multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(PROJECT_IS_TOP_LEVEL AND NOT mscclpp_ep_multi_config AND NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo or MinSizeRel" FORCE)
endif()
