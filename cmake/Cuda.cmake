# The CUDA backend: AUTO builds it where there is a compiler for it. The only place where CUDA is
# enabled. Sets mscclpp_ep_cuda to ON or OFF.

set(mscclpp_ep_cuda OFF)
string(TOUPPER "${MSCCLPP_EP_CUDA}" mscclpp_ep_cuda_wanted)
if(NOT mscclpp_ep_cuda_wanted MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MSCCLPP_EP_CUDA is '${MSCCLPP_EP_CUDA}'; allowed are AUTO, ON and OFF.")
endif()
if(NOT mscclpp_ep_cuda_wanted STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
      # Machine code for the A100 and the H100; newer chips compile the PTX of the latter.
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    endif()
    enable_language(CUDA)
    # A parent project links what a static library needs.
    set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)
    find_package(CUDAToolkit REQUIRED)
    unset(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL)
    if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.5)
      set(mscclpp_ep_cuda ON)
    endif()
  endif()
  if(NOT mscclpp_ep_cuda AND mscclpp_ep_cuda_wanted STREQUAL "ON")
    message(FATAL_ERROR "MSCCLPP_EP_CUDA=ON needs nvcc of CUDA 12.5 or newer: install the CUDA "
                        "toolkit, and set CUDACXX to its nvcc if that is not on the PATH.")
  endif()
endif()
