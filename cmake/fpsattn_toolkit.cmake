# Finds nvcc: a toolkit on the machine (CUDA_HOME, PATH, /usr/local/cuda), else, where kernels are wanted (FPSATTN_BUILD_CUDA=ON, or
# a Hopper GPU is present), the pinned wheels of cuda_wheels.py, fetched once. Sets CMAKE_CUDA_COMPILER, or FPSATTN_CUDA_REASON.
set(FPSATTN_CUDA_WHEELS "$ENV{FPSATTN_CUDA_WHEELS}" CACHE STRING
  "nvcc from the package index. Empty or AUTO: where the machine has none; ON: always; OFF: never")

# Whether an sm_90 GPU is present: fpsattn_find_hopper(variable).
function(fpsattn_find_hopper variable)
  set(${variable} OFF PARENT_SCOPE)
  find_program(FPSATTN_NVIDIA_SMI nvidia-smi)
  mark_as_advanced(FPSATTN_NVIDIA_SMI)
  if(FPSATTN_NVIDIA_SMI)
    execute_process(COMMAND "${FPSATTN_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities ERROR_QUIET)
    if(capabilities MATCHES "(^|\n)9\\.0")
      set(${variable} ON PARENT_SCOPE)
    endif()
  endif()
endfunction()

function(fpsattn_fetch_toolkit)
  execute_process(COMMAND "${Python_EXECUTABLE}" "${PROJECT_SOURCE_DIR}/cmake/cuda_wheels.py" "${FPSATTN_FETCH_DIR}/cuda_wheels"
                  RESULT_VARIABLE status OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(status EQUAL 0)
    set(CMAKE_CUDA_COMPILER "${root}/bin/nvcc" CACHE FILEPATH "nvcc from the package index" FORCE)
    set(CUDAToolkit_ROOT "${root}" CACHE PATH "" FORCE)
  else()
    set(FPSATTN_CUDA_REASON "no nvcc found, and none could be fetched from the package index" PARENT_SCOPE)
  endif()
endfunction()

if(NOT CMAKE_CUDA_COMPILER AND NOT FPSATTN_CUDA_WHEELS STREQUAL "ON")
  include(CheckLanguage)
  foreach(toolkit "$ENV{CUDA_HOME}" /usr/local/cuda)
    if(NOT CMAKE_CUDA_COMPILER AND EXISTS "${toolkit}/bin/nvcc")
      set(CMAKE_CUDA_COMPILER "${toolkit}/bin/nvcc")
    endif()
  endforeach()
  check_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER)
  fpsattn_find_hopper(hopper)
  if(FPSATTN_CUDA_WHEELS STREQUAL "OFF")
    set(FPSATTN_CUDA_REASON "no nvcc found: install the CUDA toolkit (>= 12.4) and set CUDA_HOME")
  elseif(FPSATTN_BUILD_CUDA STREQUAL "ON" OR hopper OR FPSATTN_CUDA_WHEELS STREQUAL "ON")
    unset(CMAKE_CUDA_COMPILER)  # check_language left NOTFOUND there
    unset(CMAKE_CUDA_COMPILER CACHE)
    fpsattn_fetch_toolkit()
  else()
    set(FPSATTN_CUDA_REASON "neither nvcc nor a Hopper GPU found: FPSATTN_BUILD_CUDA=ON builds the kernels all the same, with nvcc from the package index")
  endif()
endif()
