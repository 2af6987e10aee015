# GoogleTest: the machine's (Debian, Ubuntu: libgtest-dev), else its sources from the package index, where the wheel of
# ros-gtest-vendor carries those of release 1.15 unchanged. The wheel is pinned by its hash; only its sources are used, so one wheel
# serves every processor and Python.
find_package(GTest QUIET)
if(TARGET GTest::gtest)
  return()
endif()

set(folder "${FPSATTN_FETCH_DIR}/googletest")
file(WRITE "${folder}/requirements.txt" "ros-gtest-vendor==1.15.1 --hash=sha256:6a578c55eca01c7d215e54bf1dd3172ada677b591dd2f5d3c8260b882364ee6e\n")
file(GLOB sources "${folder}/*/data/src/gtest_vendor/src/gtest-all.cc")
if(NOT sources)
  message(STATUS "fpsattention: no GoogleTest on this machine: fetching its sources from the package index")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes
            --only-binary=:all: --platform manylinux_2_28_x86_64 --implementation cp --python-version 3.11 --abi cp311
            --dest "${folder}" --requirement "${folder}/requirements.txt"
    RESULT_VARIABLE status ERROR_VARIABLE log OUTPUT_VARIABLE log)
  file(GLOB wheel "${folder}/ros_gtest_vendor-*.whl")
  if(NOT wheel)
    message(FATAL_ERROR
      "fpsattention: the C++ tests need GoogleTest: apt install libgtest-dev (Debian, Ubuntu), or a package index to fetch it from "
      "(pip exit status ${status}). Without the C++ tests: FPSATTN_BUILD_TESTS=OFF.\n${log}")
  endif()
  file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${folder}")
  file(GLOB sources "${folder}/*/data/src/gtest_vendor/src/gtest-all.cc")
endif()
get_filename_component(googletest "${sources}" DIRECTORY)
get_filename_component(googletest "${googletest}" DIRECTORY)
find_package(Threads REQUIRED)
add_library(fpsattn_gtest STATIC "${sources}")
target_compile_options(fpsattn_gtest PRIVATE -O1)  # three times as fast to compile, as fast to run
target_include_directories(fpsattn_gtest SYSTEM PUBLIC "${googletest}/include" PRIVATE "${googletest}")
target_link_libraries(fpsattn_gtest PUBLIC Threads::Threads)
add_library(GTest::gtest ALIAS fpsattn_gtest)
