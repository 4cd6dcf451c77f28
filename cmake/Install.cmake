# Installs the library, its headers and its CMake package, relocatably.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

if(SKBUILD)
  # Inside a Python package the places are fixed: the extension finds the library by $ORIGIN/lib.
  set(CMAKE_INSTALL_LIBDIR lib)
  set(CMAKE_INSTALL_INCLUDEDIR include)
endif()
set(mscclpp_ep_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/mscclpp_ep")

install(
  TARGETS mscclpp_ep
  EXPORT mscclpp_ep-targets
  RUNTIME COMPONENT runtime
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime NAMELINK_COMPONENT dev
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT dev
  FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT dev)
install(
  EXPORT mscclpp_ep-targets
  NAMESPACE mscclpp_ep::
  DESTINATION "${mscclpp_ep_package_dir}"
  COMPONENT dev)

configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/mscclpp_ep-config.cmake.in"
  "${PROJECT_BINARY_DIR}/mscclpp_ep-config.cmake"
  INSTALL_DESTINATION "${mscclpp_ep_package_dir}")
# While the major version is 0, a new minor version may break the interface.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/mscclpp_ep-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion)
install(
  FILES "${PROJECT_BINARY_DIR}/mscclpp_ep-config.cmake"
        "${PROJECT_BINARY_DIR}/mscclpp_ep-config-version.cmake"
  DESTINATION "${mscclpp_ep_package_dir}"
  COMPONENT dev)

# find_package(mscclpp_ep) inside this build, in the examples for instance, means these targets.
file(WRITE "${CMAKE_FIND_PACKAGE_REDIRECTS_DIR}/mscclpp_ep-config.cmake" "")
file(COPY_FILE "${PROJECT_BINARY_DIR}/mscclpp_ep-config-version.cmake"
     "${CMAKE_FIND_PACKAGE_REDIRECTS_DIR}/mscclpp_ep-config-version.cmake")
