# ctest -L bench: the Wan shapes on a GPU; under an emulator one small shape, whose times mean nothing.
add_executable(bench_backward bench_backward.cu)
target_include_directories(bench_backward PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp")
target_compile_options(bench_backward PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${FPSATTN_GENCODE}>)
target_link_libraries(bench_backward PRIVATE fpsattn CUDA::cudart)
add_test(NAME bench_backward COMMAND bench_backward $<$<BOOL:${FPSATTN_EMULATOR}>:--small>)
set_tests_properties(bench_backward PROPERTIES LABELS bench SKIP_RETURN_CODE 77)
