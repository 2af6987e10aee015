# Tests of csrc/forward.
if(FPSATTN_HAS_CUDA)
  include("${CMAKE_CURRENT_LIST_DIR}/support/device_test.cmake")
  fpsattn_add_device_test(test_forward test_forward.cpp forward_case.cpp)
endif()
