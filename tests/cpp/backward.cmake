# Tests of csrc/backward.
if(FPSATTN_HAS_CUDA)
  fpsattn_add_case(backward_case backward_case.cpp)
  fpsattn_add_device_test(test_backward test_backward.cpp $<TARGET_OBJECTS:backward_case>)

  fpsattn_add_gtest(test_backward_guard test_backward_guard.cpp $<TARGET_OBJECTS:backward_case> LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_cases(test_backward_guard query_block kv_block list_length tile token)

  fpsattn_add_gtest(test_backward_errors test_backward_errors.cpp LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_run(test_backward_errors test_backward_errors)
endif()
