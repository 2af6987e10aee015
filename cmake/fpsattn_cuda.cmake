# Decides whether the sm_90a kernels are built, and how. Sets FPSATTN_HAS_CUDA, FPSATTN_CUDA_REASON.
set(FPSATTN_HAS_CUDA OFF)
if(FPSATTN_BUILD_CUDA STREQUAL "OFF")
  set(FPSATTN_CUDA_REASON "FPSATTN_BUILD_CUDA=OFF")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # the flags below name the architecture
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # one runtime in the process, torch's; an emulator can replace it
include(fpsattn_toolkit)  # sets CMAKE_CUDA_COMPILER, or says in FPSATTN_CUDA_REASON why not
if(NOT CMAKE_CUDA_COMPILER)
  if(FPSATTN_BUILD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "fpsattention: FPSATTN_BUILD_CUDA=ON but ${FPSATTN_CUDA_REASON}")
  endif()
  return()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  set(FPSATTN_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION} is too old for these sm_90a kernels: >= 12.4 is needed")
  if(FPSATTN_BUILD_CUDA STREQUAL "ON")
    message(FATAL_ERROR "fpsattention: FPSATTN_BUILD_CUDA=ON but ${FPSATTN_CUDA_REASON}")
  endif()
  return()
endif()
find_package(CUDAToolkit REQUIRED)
include(fpsattn_cutlass)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(FPSATTN_HAS_CUDA ON)
set(FPSATTN_CUDA_REASON "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# PTX is embedded beside the SASS: an emulator runs it, and a reader can look at it.
if(FPSATTN_PTX_ONLY)
  set(FPSATTN_GENCODE "-gencode=arch=compute_90a,code=compute_90a")
else()
  set(FPSATTN_GENCODE "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]")
endif()
set(FPSATTN_NVCC_FLAGS ${FPSATTN_GENCODE} -lineinfo --expt-relaxed-constexpr -Xptxas=--warn-on-spills
    -Xptxas=--warn-on-local-memory-usage --diag-suppress=20012)

# fpsattn_add_kernel(name source...): an object library of .cu files that becomes part of libfpsattn.
function(fpsattn_add_kernel name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/csrc")
  target_include_directories(${name} SYSTEM PRIVATE "${FPSATTN_CUTLASS_INCLUDE_DIR}" ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${FPSATTN_NVCC_FLAGS}>)
  # Fails the build where ptxas serializes WGMMAs. In front of the user's own launcher (ccache), if there is one.
  # The interpreter itself, not a name of it: objects stay good whatever name it is called by next time.
  file(REAL_PATH "${Python_EXECUTABLE}" interpreter)
  set(launcher "${interpreter}" "${PROJECT_SOURCE_DIR}/cmake/nvcc_checked.py" ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${name} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
  set_property(GLOBAL APPEND PROPERTY FPSATTN_KERNEL_OBJECTS ${name})
endfunction()
