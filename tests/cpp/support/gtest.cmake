# Test programs made of GoogleTest cases.
#   fpsattn_add_gtest(program source... LIBRARIES library...)   builds a program
#   fpsattn_add_case(library source)                            what several programs share, compiled once
#   fpsattn_add_host_test(program)                              runs it as it is
#   fpsattn_add_device_run(name program [option...])            runs it under the emulator with these options, or on the GPU
#   fpsattn_add_device_test(program source...)                  builds it, and runs it in every mode below
#   fpsattn_add_device_cases(program case...)                   runs each case in a process of its own: a trap costs the context
# ctest shows a program as skipped where all its cases were. Every run leaves its cases in results/NAME.xml of the build folder.
include_guard(GLOBAL)

add_library(fpsattn_gtest_main STATIC "${CMAKE_CURRENT_LIST_DIR}/main.cpp")
target_link_libraries(fpsattn_gtest_main PUBLIC GTest::gtest)
# Half of a test's compilation is these. A precompiled header serves equal code generation only: none asks for PIC or PIE.
set_target_properties(fpsattn_gtest_main PROPERTIES POSITION_INDEPENDENT_CODE OFF)
target_precompile_headers(fpsattn_gtest_main PRIVATE
  <gtest/gtest.h> <algorithm> <array> <cmath> <cstdint> <functional> <memory> <random> <sstream> <string> <vector>)

# When the emulator lets asynchronous work happen, and how its FP8 WGMMA accumulates. Its stricter checks are independent of that, and so
# are how finely warps interleave and how many SMs there are (few: each CTA takes many work items): each has its turn in one of the modes.
set(FPSATTN_EMULATOR_MODES
  "eager --async=eager"
  "lazy --async=lazy --strict-proxy"
  "random --async=random --seed=7 --quantum=20 --racecheck --sms=4"
  "truncated --async=random --seed=11 --sms=2 --fp8-acc=truncated")

function(fpsattn_test_target target)
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp" "${PROJECT_SOURCE_DIR}/csrc")
  target_link_libraries(${target} PRIVATE ${ARGN} fpsattn_gtest_main)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_precompile_headers(${target} REUSE_FROM fpsattn_gtest_main)
endfunction()

function(fpsattn_add_case library source)
  add_library(${library} OBJECT ${source})
  fpsattn_test_target(${library} fpsattn CUDA::cudart)
endfunction()

function(fpsattn_add_gtest program)
  cmake_parse_arguments(arg "" "" "LIBRARIES" ${ARGN})
  add_executable(${program} ${arg_UNPARSED_ARGUMENTS})
  fpsattn_test_target(${program} ${arg_LIBRARIES})
endfunction()

function(fpsattn_set_run name label environment)
  set_tests_properties(${name} PROPERTIES LABELS ${label} SKIP_RETURN_CODE 77
    ENVIRONMENT "GTEST_OUTPUT=xml:${PROJECT_BINARY_DIR}/results/${name}.xml;${environment}")
endfunction()

function(fpsattn_add_host_test program)
  # A generator expression keeps CMAKE_CROSSCOMPILING_EMULATOR away: nothing here needs a GPU.
  add_test(NAME ${program} COMMAND $<TARGET_FILE:${program}>)
  fpsattn_set_run(${program} host "")
endfunction()

function(fpsattn_add_device_run name program)
  string(REPLACE ";" " " options "${ARGN}")
  add_test(NAME ${name} COMMAND ${program})
  fpsattn_set_run(${name} device "HOPPER_EMU_OPTS=${options}")
endfunction()

function(fpsattn_add_device_test program)
  fpsattn_add_gtest(${program} ${ARGN} LIBRARIES fpsattn CUDA::cudart)
  if(NOT FPSATTN_EMULATOR)
    fpsattn_add_device_run(${program} ${program})
    return()
  endif()
  foreach(mode IN LISTS FPSATTN_EMULATOR_MODES)
    string(REGEX MATCH "^([a-z]+) (.*)$" _ "${mode}")
    fpsattn_add_device_run(${program}.${CMAKE_MATCH_1} ${program} ${CMAKE_MATCH_2})
  endforeach()
endfunction()

function(fpsattn_add_device_cases program)
  foreach(case IN LISTS ARGN)
    add_test(NAME ${program}.${case} COMMAND ${program} --gtest_filter=*/${case})
    fpsattn_set_run(${program}.${case} device "")
  endforeach()
endfunction()
