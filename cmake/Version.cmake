# Reads the version from version.hpp, the only place where it is written.

set(mscclpp_ep_version_header
    "${CMAKE_CURRENT_LIST_DIR}/../src/ep/include/mscclpp_ep/version.hpp")
# Configure again when the version changes.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${mscclpp_ep_version_header}")
file(READ "${mscclpp_ep_version_header}" mscclpp_ep_version_text)

set(mscclpp_ep_version "")
foreach(part IN ITEMS MAJOR MINOR PATCH)
  if(NOT mscclpp_ep_version_text MATCHES "#define[ \t]+MSCCLPP_EP_VERSION_${part}[ \t]+([0-9]+)")
    message(FATAL_ERROR "${mscclpp_ep_version_header} does not define MSCCLPP_EP_VERSION_${part}")
  endif()
  list(APPEND mscclpp_ep_version ${CMAKE_MATCH_1})
endforeach()
list(JOIN mscclpp_ep_version "." mscclpp_ep_version)
