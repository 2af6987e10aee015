# Tests of csrc/backward.
if(FPSATTN_HAS_CUDA)
  include("${CMAKE_CURRENT_LIST_DIR}/support/device_test.cmake")
  fpsattn_add_device_test(test_backward test_backward.cpp backward_case.cpp)
  if(FPSATTN_EMULATOR)  # its stricter checks, and an accumulator that drops bits as a tensor core does
    foreach(mode "truncated;--async=lazy --fp8-acc=truncated" "racecheck;--async=random --seed=3 --racecheck"
                 "strict;--async=lazy --strict-proxy")
      list(GET mode 0 word)
      list(GET mode 1 options)
      add_test(NAME test_backward.${word} COMMAND test_backward)
      set_tests_properties(test_backward.${word} PROPERTIES ENVIRONMENT "HOPPER_EMU_OPTS=${options}" LABELS "device")
    endforeach()
  endif()

  add_executable(test_backward_guard test_backward_guard.cpp backward_case.cpp)
  target_include_directories(test_backward_guard PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp" "${PROJECT_SOURCE_DIR}/csrc")
  target_link_libraries(test_backward_guard PRIVATE fpsattn CUDA::cudart GTest::gtest_main)
  foreach(case query_block kv_block list_length tile token)  # a process each: a trap costs the context
    add_test(NAME test_backward_guard.${case} COMMAND test_backward_guard --gtest_filter=*/${case})
    set_tests_properties(test_backward_guard.${case} PROPERTIES LABELS "device")
  endforeach()

  add_executable(test_backward_errors test_backward_errors.cpp)
  target_link_libraries(test_backward_errors PRIVATE fpsattn CUDA::cudart GTest::gtest_main)
  add_test(NAME test_backward_errors COMMAND test_backward_errors)
endif()
