# Planner and block lists: host only, no CUDA.
foreach(name test_tile_layout test_block_mask)
  fpsattn_add_gtest(${name} ${name}.cpp LIBRARIES fpsattn_core)
  fpsattn_add_host_test(${name})
endforeach()
