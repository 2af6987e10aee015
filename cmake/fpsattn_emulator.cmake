# How device tests run: natively where a Hopper GPU is present, else under the emulator in tools/hopper-emu, which is built with them.
# FPSATTN_EMULATOR overrides: another launcher (called as LAUNCHER run -- program args...), or OFF.
set(FPSATTN_EMULATOR "$ENV{FPSATTN_EMULATOR}" CACHE STRING "AUTO or empty: tools/hopper-emu where there is no Hopper GPU; OFF: natively; else a launcher")
if(FPSATTN_EMULATOR STREQUAL "" OR FPSATTN_EMULATOR STREQUAL "AUTO")
  fpsattn_find_hopper(hopper)
  if(hopper)
    set(FPSATTN_EMULATOR OFF)
  else()
    set(FPSATTN_EMULATOR "${PROJECT_SOURCE_DIR}/tools/hopper-emu/bin/hopper-emu")
    add_custom_target(hopper_emu ALL VERBATIM
      COMMAND "${CMAKE_COMMAND}" -E env "HOPPER_EMU_CUDA_INCLUDE=${CUDAToolkit_INCLUDE_DIRS}" "${FPSATTN_EMULATOR}" build
      COMMENT "The emulator that runs the device tests")
  endif()
endif()
if(FPSATTN_EMULATOR)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${FPSATTN_EMULATOR};run;--")
  set(FPSATTN_DEVICE_LAUNCHER "${FPSATTN_EMULATOR}" CACHE INTERNAL "What stands before a program that launches kernels")
  message(STATUS "fpsattention: device tests run under ${FPSATTN_EMULATOR}")
else()
  set(FPSATTN_DEVICE_LAUNCHER "" CACHE INTERNAL "")
  message(STATUS "fpsattention: device tests run natively")
endif()
