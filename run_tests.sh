#!/usr/bin/env bash
# Runs every test: Python (pytest), C++ (ctest), and the sm_90a kernels through the torch ops. Needs the package installed in
# the current Python environment (README's first command). Exit status 0 only if everything passed.
#
# Device tests run natively on a Hopper GPU; without one, under the emulator of tools/hopper-emu.
# Environment: FPSATTN_EMULATOR (another launcher), PYTHON (default: python), FPSATTN_TEST_BUILD (default: build/tests), FPSATTN_TEST_JOBS (default: cores).
set -uo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
build=${FPSATTN_TEST_BUILD:-build/tests}
jobs=${FPSATTN_TEST_JOBS:-$(nproc)}
failed=()
step() { printf '\n==== %s\n' "$*"; }
attempt() { local name=$1; shift; "$@" || failed+=("$name"); }

step "test requirements"
"$python" - <<'PY' | xargs -d '\n' "$python" -m pip install -q --disable-pip-version-check cmake ninja pybind11 || exit 1
import re
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
def expand(name):
    for requirement in extras[name]:
        own = re.fullmatch(r"fpsattention\[(\w+)\]", requirement)
        yield from expand(own[1]) if own else [requirement]
print("\n".join(expand("test")))
PY
"$python" -c "import fpsattention" || { echo "run_tests.sh: fpsattention is not installed for $python: run README's first command"; exit 1; }
library=$("$python" -c "import fpsattention, pathlib; print(pathlib.Path(fpsattention.__file__).parent / 'lib')")
mkdir -p "$(dirname "$build")"

gpu=no; nvidia-smi -L >/dev/null 2>&1 && gpu=yes
emulator=""; [ "$gpu" = no ] && emulator=${FPSATTN_EMULATOR:-$PWD/tools/hopper-emu/bin/hopper-emu}
# One thread per worker: the tests are small, and torch's own threads would only fight each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 FPSATTN_BUILD_DIR="$library"

step "pytest"
attempt pytest "$python" -m pytest -n "$jobs" -q tests/python tests/static

if [ -f "$library/libfpsattn.so" ] && [ -n "$emulator" ]; then
  step "pytest: the sm_90a kernels through the torch ops, under the emulator"
  attempt "pytest-sm90" env FPSATTN_SM90_ON_HOST=1 HOPPER_EMU_OPTS="--async=lazy" \
    "$emulator" run -- "$python" -m pytest -q -p no:xdist tests/python/test_sm90_*.py
fi

step "ctest"
ptx_only=OFF; [ -n "$emulator" ] && ptx_only=ON  # an emulator runs PTX: ptxas is not needed for these binaries
attempt cmake cmake -S . -B "$build" -G Ninja -DFPSATTN_BUILD_PYTHON=OFF -DFPSATTN_PTX_ONLY=$ptx_only \
  -DFPSATTN_EMULATOR="$emulator" -DPython_EXECUTABLE="$(command -v "$python")" >"$build.configure.log" 2>&1 \
  || true
tail -n 2 "$build.configure.log"
attempt build cmake --build "$build" --parallel "${MAX_JOBS:-2}"
attempt ctest ctest --test-dir "$build" --output-on-failure -LE bench -j "$jobs"

if [ ${#failed[@]} -gt 0 ]; then
  printf '\nrun_tests.sh: FAILED: %s\n' "${failed[*]}"
  exit 1
fi
printf '\nrun_tests.sh: everything passed\n'
