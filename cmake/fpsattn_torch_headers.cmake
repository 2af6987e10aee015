# Torch's headers, found by path without importing torch (setup.py passes FPSATTN_TORCH_DIR; a plain CMake build takes the one
# of the Python interpreter). Sets FPSATTN_TORCH_INCLUDE_DIRS, FPSATTN_TORCH_VERSION.
set(FPSATTN_TORCH_DIR "$ENV{FPSATTN_TORCH_DIR}" CACHE PATH "The installed torch package folder (holds include/ and version.py)")
if(NOT FPSATTN_TORCH_DIR)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                  OUTPUT_VARIABLE purelib OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(FPSATTN_TORCH_DIR "${purelib}/torch" CACHE PATH "" FORCE)
endif()
if(NOT EXISTS "${FPSATTN_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "fpsattention: no torch headers in '${FPSATTN_TORCH_DIR}' (looked for include/torch/csrc/stable/library.h, torch >= 2.10). "
    "Install torch first (pip install 'torch>=2.10'), or set FPSATTN_TORCH_DIR to the torch package folder.")
endif()
file(STRINGS "${FPSATTN_TORCH_DIR}/version.py" version_line REGEX "^__version__ *=")
string(REGEX REPLACE ".*['\"]([^'\"]+)['\"].*" "\\1" FPSATTN_TORCH_VERSION "${version_line}")
set(FPSATTN_TORCH_VERSION "${FPSATTN_TORCH_VERSION}" PARENT_SCOPE)
set(FPSATTN_TORCH_INCLUDE_DIRS "${FPSATTN_TORCH_DIR}/include")
message(STATUS "fpsattention: torch ${FPSATTN_TORCH_VERSION} headers in ${FPSATTN_TORCH_INCLUDE_DIRS}")
