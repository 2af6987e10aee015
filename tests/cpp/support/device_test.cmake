# fpsattn_add_device_test(name source...): an executable of GoogleTest cases that launch kernels.
#
# With FPSATTN_EMULATOR it becomes three ctest cases, one per time at which the emulator lets asynchronous work happen; otherwise it
# is one case that runs natively and skips, with the reason, where there is no sm_90 GPU.
include_guard(GLOBAL)

function(fpsattn_add_device_test name)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp" "${PROJECT_SOURCE_DIR}/csrc")
  target_link_libraries(${name} PRIVATE fpsattn CUDA::cudart GTest::gtest_main)
  if(FPSATTN_EMULATOR)
    foreach(mode "eager" "lazy" "random --seed=7")
      string(REGEX MATCH "^[a-z]+" word "${mode}")
      add_test(NAME ${name}.${word} COMMAND ${name})
      set_tests_properties(${name}.${word} PROPERTIES ENVIRONMENT "HOPPER_EMU_OPTS=--async=${mode}" LABELS "device")
    endforeach()
  else()
    add_test(NAME ${name} COMMAND ${name})
    set_tests_properties(${name} PROPERTIES LABELS "device")
  endif()
endfunction()
