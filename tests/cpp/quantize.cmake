# Tests of csrc/quantize.
if(FPSATTN_HAS_CUDA)
  include("${CMAKE_CURRENT_LIST_DIR}/support/device_test.cmake")
  fpsattn_add_device_test(test_quantize test_quantize.cpp quantize_case.cpp)
  if(FPSATTN_EMULATOR)  # its stricter checks
    foreach(mode "racecheck;--async=random --seed=3 --racecheck" "strict;--async=lazy --strict-proxy")
      list(GET mode 0 word)
      list(GET mode 1 options)
      add_test(NAME test_quantize.${word} COMMAND test_quantize)
      set_tests_properties(test_quantize.${word} PROPERTIES ENVIRONMENT "HOPPER_EMU_OPTS=${options}" LABELS "device")
    endforeach()
  endif()

  add_executable(test_quantize_guard test_quantize_guard.cpp quantize_case.cpp)
  target_include_directories(test_quantize_guard PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp" "${PROJECT_SOURCE_DIR}/csrc")
  target_link_libraries(test_quantize_guard PRIVATE fpsattn CUDA::cudart GTest::gtest_main)
  foreach(case token tile_end tile_begin)  # a process each: a trap costs the context
    add_test(NAME test_quantize_guard.${case} COMMAND test_quantize_guard --gtest_filter=*/${case})
    set_tests_properties(test_quantize_guard.${case} PROPERTIES LABELS "device")
  endforeach()

  add_executable(test_quantize_errors test_quantize_errors.cpp)
  target_link_libraries(test_quantize_errors PRIVATE fpsattn CUDA::cudart GTest::gtest_main)
  add_test(NAME test_quantize_errors COMMAND test_quantize_errors)
endif()
