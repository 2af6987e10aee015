# ctest -L bench: the Wan shapes on a GPU; under an emulator one small shape, whose times mean nothing.
add_executable(bench_forward bench_forward.cu)
target_include_directories(bench_forward PRIVATE "${PROJECT_SOURCE_DIR}/tests/cpp")
target_compile_options(bench_forward PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${FPSATTN_GENCODE}>)
target_link_libraries(bench_forward PRIVATE fpsattn CUDA::cudart)
add_test(NAME bench_forward COMMAND bench_forward $<$<BOOL:${FPSATTN_EMULATOR}>:--small>)
set_tests_properties(bench_forward PROPERTIES LABELS bench SKIP_RETURN_CODE 77)
