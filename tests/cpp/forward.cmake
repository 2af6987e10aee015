# Tests of csrc/forward.
if(FPSATTN_HAS_CUDA)
  fpsattn_add_case(forward_case forward_case.cpp)
  fpsattn_add_device_test(test_forward_schedule test_forward_schedule.cpp)
  fpsattn_add_device_test(test_forward test_forward.cpp test_forward_identities.cpp $<TARGET_OBJECTS:forward_case>)

  fpsattn_add_device_test(test_forward_clusters test_forward_clusters.cpp $<TARGET_OBJECTS:forward_case>)

  fpsattn_add_gtest(test_forward_accumulation test_forward_accumulation.cpp $<TARGET_OBJECTS:forward_case> LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_run(test_forward_accumulation test_forward_accumulation --fp8-acc=truncated)

  fpsattn_add_gtest(test_forward_guard test_forward_guard.cpp $<TARGET_OBJECTS:forward_case> LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_cases(test_forward_guard tile_too_large tile_negative block_too_large count_too_large count_negative)

  fpsattn_add_gtest(test_fragments test_fragments.cpp LIBRARIES fpsattn CUDA::cudart)
  target_include_directories(test_fragments SYSTEM PRIVATE "${FPSATTN_CUTLASS_INCLUDE_DIR}")
  fpsattn_add_host_test(test_fragments)

  fpsattn_add_gtest(test_forward_errors test_forward_errors.cpp LIBRARIES fpsattn CUDA::cudart)
  fpsattn_add_device_run(test_forward_errors test_forward_errors)
endif()
