# What a C++ user gets: headers, libfpsattn and a package configuration, so that find_package(fpsattn) works. A component of its
# own, left out of the default install, which fills the Python package:
#   cmake --install BUILD --component fpsattn_cpp --prefix PREFIX
include(CMakePackageConfigHelpers)
set(cpp COMPONENT fpsattn_cpp EXCLUDE_FROM_ALL)

install(TARGETS fpsattn EXPORT fpsattnTargets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" ${cpp})
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/fpsattn" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" ${cpp})
install(EXPORT fpsattnTargets NAMESPACE fpsattn:: DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/fpsattn" ${cpp})

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/fpsattnConfig.cmake.in" "${PROJECT_BINARY_DIR}/fpsattnConfig.cmake"
  INSTALL_DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/fpsattn")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/fpsattnConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/fpsattnConfig.cmake" "${PROJECT_BINARY_DIR}/fpsattnConfigVersion.cmake"
  DESTINATION "${CMAKE_INSTALL_LIBDIR}/cmake/fpsattn" ${cpp})
