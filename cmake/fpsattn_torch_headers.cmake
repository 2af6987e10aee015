# Torch's headers, found by path without importing torch: FPSATTN_TORCH_DIR (setup.py passes the installed one), the torch of the
# Python interpreter, else those of a pinned release, fetched once into the build folder. The stable ABI is the same in every
# torch >= 2.10, so headers of one release serve all. Sets FPSATTN_TORCH_INCLUDE_DIRS, FPSATTN_TORCH_VERSION.
set(FPSATTN_TORCH_DIR "$ENV{FPSATTN_TORCH_DIR}" CACHE PATH "A torch package folder (holds include/ and version.py)")
set(FPSATTN_TORCH_HEADERS_VERSION 2.13.0)

# The wheel for macOS is the smallest (110 MB; those for Linux with CUDA need gigabytes): of one release, the headers of the stable ABI
# are the same files in all of them.
function(fpsattn_fetch_torch_headers folder)
  if(NOT EXISTS "${folder}/torch/version.py")
    message(STATUS "fpsattention: no torch installed: fetching the headers of torch ${FPSATTN_TORCH_HEADERS_VERSION} (110 MB)")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all:
              --platform macosx_14_0_arm64 --implementation cp --python-version 3.12 --abi cp312
              --dest "${folder}" "torch==${FPSATTN_TORCH_HEADERS_VERSION}"
      RESULT_VARIABLE status ERROR_VARIABLE log OUTPUT_VARIABLE log)
    file(GLOB wheel "${folder}/torch-*.whl")
    if(NOT wheel)
      message(FATAL_ERROR
        "fpsattention: no torch headers: no torch is installed, and they could not be fetched (pip exit status ${status}). Install torch "
        "first (pip install 'torch>=2.10'), or set FPSATTN_TORCH_DIR to a torch package folder.\n${log}")
    endif()
    file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${folder}" PATTERNS "torch/include/*" "torch/version.py")
    file(REMOVE "${wheel}")
  endif()
endfunction()

if(NOT FPSATTN_TORCH_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE purelib OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(EXISTS "${purelib}/torch/version.py")
    set(FPSATTN_TORCH_DIR "${purelib}/torch")
  else()
    fpsattn_fetch_torch_headers("${FPSATTN_FETCH_DIR}/torch_headers")
    set(FPSATTN_TORCH_DIR "${FPSATTN_FETCH_DIR}/torch_headers/torch")
  endif()
endif()
if(NOT EXISTS "${FPSATTN_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "fpsattention: no torch headers in '${FPSATTN_TORCH_DIR}' (looked for include/torch/csrc/stable/library.h, torch >= 2.10). "
    "Install another torch (pip install 'torch>=2.10'), or set FPSATTN_TORCH_DIR to a torch package folder.")
endif()
file(STRINGS "${FPSATTN_TORCH_DIR}/version.py" version_line REGEX "^__version__ *=")
string(REGEX REPLACE ".*['\"]([^'\"]+)['\"].*" "\\1" FPSATTN_TORCH_VERSION "${version_line}")
set(FPSATTN_TORCH_VERSION "${FPSATTN_TORCH_VERSION}" PARENT_SCOPE)
set(FPSATTN_TORCH_INCLUDE_DIRS "${FPSATTN_TORCH_DIR}/include")
message(STATUS "fpsattention: torch ${FPSATTN_TORCH_VERSION} headers in ${FPSATTN_TORCH_INCLUDE_DIRS}")
