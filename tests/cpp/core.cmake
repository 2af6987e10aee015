# Planner and block lists: host only, no CUDA.
foreach(name test_tile_layout test_block_mask)
  add_executable(${name} ${name}.cpp)
  target_link_libraries(${name} PRIVATE fpsattn_core GTest::gtest_main)
  # A generator expression keeps CMAKE_CROSSCOMPILING_EMULATOR away: nothing here needs a GPU.
  add_test(NAME ${name} COMMAND $<TARGET_FILE:${name}>)
endforeach()
