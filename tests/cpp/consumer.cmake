# The C++ component, installed and then used by a project of its own (tests/cpp/consumer).
if(FPSATTN_HAS_CUDA)
  set(prefix "${CMAKE_CURRENT_BINARY_DIR}/consumer_prefix")
  add_test(NAME install_cpp
    COMMAND "${CMAKE_COMMAND}" --install "${PROJECT_BINARY_DIR}" --component fpsattn_cpp --prefix "${prefix}")
  set_tests_properties(install_cpp PROPERTIES FIXTURES_SETUP installed_cpp)
  add_test(NAME consumer
    COMMAND "${CMAKE_CTEST_COMMAND}" --build-and-test "${CMAKE_CURRENT_SOURCE_DIR}/consumer" "${CMAKE_CURRENT_BINARY_DIR}/consumer"
      --build-generator "${CMAKE_GENERATOR}" --build-options "-DCMAKE_PREFIX_PATH=${prefix}" "-DCUDAToolkit_ROOT=${CUDAToolkit_BIN_DIR}/.."
      "-DCMAKE_BUILD_TYPE=Release" --test-command consumer)
  # The runtime of a toolkit that is not where the loader looks: nvcc from the package index.
  set_tests_properties(consumer PROPERTIES FIXTURES_REQUIRED installed_cpp
    ENVIRONMENT "LD_LIBRARY_PATH=${CUDAToolkit_LIBRARY_DIR}:$ENV{LD_LIBRARY_PATH}")
endif()
