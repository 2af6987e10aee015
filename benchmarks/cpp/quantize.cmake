# ctest -L bench: the Wan shapes on a GPU; under an emulator one small shape, whose times mean nothing.
add_executable(bench_quantize bench_quantize.cu)
target_include_directories(bench_quantize PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp")
target_compile_options(bench_quantize PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${FPSATTN_GENCODE}>)
target_link_libraries(bench_quantize PRIVATE fpsattn CUDA::cudart)
add_test(NAME bench_quantize COMMAND bench_quantize $<$<BOOL:${FPSATTN_EMULATOR}>:--small>)
set_tests_properties(bench_quantize PROPERTIES LABELS bench SKIP_RETURN_CODE 77)

# The emulator counts the bytes that the kernels move: at most 1.10 of the ideal.
if(FPSATTN_EMULATOR)
  add_test(NAME quantize_bytes COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/quantize_bytes.py"
           --emulator "${FPSATTN_EMULATOR}" $<TARGET_FILE:bench_quantize>)
endif()
