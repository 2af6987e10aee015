# Finds CUTLASS/CuTe headers: FPSATTN_CUTLASS_DIR (a CUTLASS checkout or its include folder), else the nvidia-cutlass wheel,
# fetched once into FPSATTN_FETCH_DIR without its (heavy, unneeded) runtime dependencies. Sets FPSATTN_CUTLASS_INCLUDE_DIR.
set(FPSATTN_CUTLASS_VERSION 4.2.0.0)
set(FPSATTN_CUTLASS_DIR "$ENV{FPSATTN_CUTLASS_DIR}" CACHE PATH "CUTLASS checkout or include folder")

function(fpsattn_find_cutlass)
  foreach(candidate "${FPSATTN_CUTLASS_DIR}" "${FPSATTN_CUTLASS_DIR}/include"
                    "${FPSATTN_FETCH_DIR}/cutlass/cutlass_library/source/include")
    if(candidate AND EXISTS "${candidate}/cute/tensor.hpp")
      set(FPSATTN_CUTLASS_INCLUDE_DIR "${candidate}" PARENT_SCOPE)
      message(STATUS "fpsattention: CUTLASS headers in ${candidate}")
      return()
    endif()
  endforeach()
  if(FPSATTN_CUTLASS_DIR)
    message(FATAL_ERROR "fpsattention: FPSATTN_CUTLASS_DIR='${FPSATTN_CUTLASS_DIR}' holds no cute/tensor.hpp (nor include/cute/tensor.hpp)")
  endif()
  message(STATUS "fpsattention: fetching the headers of nvidia-cutlass ${FPSATTN_CUTLASS_VERSION} with pip")
  # Under pip's build isolation the interpreter running CMake may lack pip: ask for pip of the base interpreter then.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps
            --dest "${FPSATTN_FETCH_DIR}/cutlass" "nvidia-cutlass==${FPSATTN_CUTLASS_VERSION}"
    RESULT_VARIABLE status ERROR_VARIABLE log)
  file(GLOB wheel "${FPSATTN_FETCH_DIR}/cutlass/nvidia_cutlass-*.whl")
  if(NOT wheel)
    message(FATAL_ERROR
      "fpsattention: could not fetch nvidia-cutlass ${FPSATTN_CUTLASS_VERSION} (pip exit status ${status}). Give its headers with "
      "FPSATTN_CUTLASS_DIR=/path/to/cutlass, or build without CUDA kernels with FPSATTN_BUILD_CUDA=OFF.\n${log}")
  endif()
  file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${FPSATTN_FETCH_DIR}/cutlass")
  set(FPSATTN_CUTLASS_INCLUDE_DIR "${FPSATTN_FETCH_DIR}/cutlass/cutlass_library/source/include" PARENT_SCOPE)
endfunction()
fpsattn_find_cutlass()
