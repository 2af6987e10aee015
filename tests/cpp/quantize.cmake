# Tests of csrc/quantize, and of the head dimension that quantize pads, through all kernels.
if(FPSATTN_HAS_CUDA)
  fpsattn_add_case(quantize_case quantize_case.cpp)
  fpsattn_add_gtest(test_head_dim test_head_dim.cpp LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_run(test_head_dim.lazy test_head_dim --async=lazy)
  fpsattn_add_device_run(test_head_dim.truncated test_head_dim --async=random --seed=11 --fp8-acc=truncated)
  fpsattn_add_device_test(test_quantize test_quantize.cpp $<TARGET_OBJECTS:quantize_case>)

  fpsattn_add_gtest(test_quantize_guard test_quantize_guard.cpp $<TARGET_OBJECTS:quantize_case> LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_cases(test_quantize_guard token tile_end tile_begin)

  fpsattn_add_gtest(test_prepare test_prepare.cpp $<TARGET_OBJECTS:quantize_case> LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_run(test_prepare test_prepare --racecheck --async=lazy)

  fpsattn_add_gtest(test_quantize_errors test_quantize_errors.cpp LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_run(test_quantize_errors test_quantize_errors)
endif()
