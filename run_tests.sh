#!/usr/bin/env bash
# Runs every test: Python, the sm_90a kernels through the torch ops and from C++, what is asserted of their machine code, the tools.
#
#   ./run_tests.sh                  everything
#   ./run_tests.sh --quick          no slow test, no C++ program, no machine code, kernels in one mode of the emulator: minutes
#   ./run_tests.sh --no-kernels     builds and tests no kernel, fetches no compiler
#
# Needs the package installed in the current Python environment (README's first command), a C++ compiler and make or ninja; no GPU
# and no CUDA toolkit. The kernels are built from this checkout into build/tests, by the machine's nvcc or else by one fetched
# from the package index (about 300 MB, into build/cuda_wheels). They run natively on a Hopper GPU and else under tools/hopper-emu.
# Ends with a table; exit status 0 only if nothing failed. docs/testing.md says more.
# Environment, all optional: PYTHON (default: python), FPSATTN_TEST_BUILD (default: build/tests), FPSATTN_TEST_JOBS (default: cores),
# MAX_JOBS (compilations at a time), FPSATTN_CUTLASS_DIR.
set -uo pipefail
cd "$(dirname "$0")"
quick=no kernels=yes
for argument in "$@"; do
  case $argument in
    --quick) quick=yes ;;
    --no-kernels) kernels=no ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "run_tests.sh: $argument came, --quick, --no-kernels or --help was wanted" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python}
jobs=${FPSATTN_TEST_JOBS:-$(env -u OMP_NUM_THREADS nproc)}  # nproc would obey that variable
mkdir -p build "${FPSATTN_TEST_BUILD:-build/tests}"
build=$(cd "${FPSATTN_TEST_BUILD:-build/tests}" && pwd)
results=$build/results
rm -rf "$results" && mkdir -p "$results"
suites=0
step() { printf '\n==== %s\n' "$*"; }
# suite NAME REPORT COMMAND...: runs it; tests/summary.py reads name, exit status, seconds and report later.
suite() {
  local name=$1 report=$2 begin=$SECONDS status
  shift 2
  step "$name"
  "$@" 2>&1 | tee "$results/$(printf %02d $((++suites)))-${name//[^A-Za-z0-9+]/_}.log"
  status=${PIPESTATUS[0]}
  printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - begin)) "$report" >>"$results/suites.tsv"
  return $status
}

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
PATH="$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"  # cmake and ninja, just installed
python=$(command -v "$python")

# What `pip install .` compiled here is taken over, once, so that only what changed since, and the tests, are compiled.
installed=$(ls -d build/package-*-"$("$python" -c 'import sys; print(sys.implementation.cache_tag)')" 2>/dev/null | head -n 1)
if [ -n "$installed" ] && ! [ -f "$build/.ninja_log" ]; then
  cp -a "$installed/." "$build/" && rm -rf "$build/CMakeCache.txt" "$build/CMakeFiles"
fi
# --quick compiles kernels to PTX, which is what the emulator runs: no ptxas. Not where there is a GPU, or machine code already.
ptx_only=OFF
[ $quick = yes ] && ! command -v nvidia-smi >/dev/null && ! ls "$build"/csrc/forward/*/*/sm90 >/dev/null 2>&1 && ptx_only=ON
[ $quick = yes ] && grep -q "^FPSATTN_PTX_ONLY:BOOL=ON" "$build/CMakeCache.txt" 2>/dev/null && ptx_only=ON

build_all() {
  local cuda=ON torch log=$build/configure.log targets=(all)
  [ $kernels = no ] && cuda=OFF
  torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
  if ! cmake -S . -B "$build" -G Ninja -DFPSATTN_BUILD_CUDA=$cuda -DFPSATTN_PTX_ONLY=$ptx_only -DFPSATTN_FETCH_DIR="$PWD/build" \
    -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DFPSATTN_TORCH_DIR="$torch" \
    ${CMAKE_ARGS:-} >"$log" 2>&1; then
    cat "$log"
    return 1
  fi
  grep -E "fetching|fpsattention [0-9]|device tests|GoogleTest" "$log"
  # One nvcc takes 3 to 5 GiB.
  local memory=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 5242880))
  if [ $quick = yes ]; then  # what the package holds, and what runs its kernels
    targets=(csrc/all)
    cmake --build "$build" --target help | grep -E "(^|/)hopper_emu:" >/dev/null && targets+=(hopper_emu)
  fi
  cmake --build "$build" --target "${targets[@]}" --parallel "${MAX_JOBS:-$((memory < 1 ? 1 : memory < jobs ? memory : jobs))}" || return 1
  # The package as it is here, with the libraries just built.
  rm -rf "$build/package" && mkdir "$build/package" && cp -r python/fpsattention "$build/package/" &&
    cmake --install "$build" --prefix "$build/package" >/dev/null
}
suite "build" - build_all
built=$?

# One thread per worker: the tests are small, and torch's own threads would only fight each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
select=()
[ $quick = yes ] && select=(-m "not slow")
tests=("$python" -m pytest -q "${select[@]}")

# Neighbours share fixtures; whoever has nothing left takes from the end of another's.
parallel=(-n "$jobs" --dist worksteal)
suite "Python" python.xml "${tests[@]}" "${parallel[@]}" --ignore-glob='*/test_sm90_*.py' tests/python --junit-xml="$results/python.xml"

if [ $built = 0 ] && [ $kernels = yes ]; then
  launcher=$(sed -n 's/^FPSATTN_DEVICE_LAUNCHER:INTERNAL=//p' "$build/CMakeCache.txt")
  # sm90 NAME REPORT [EMULATOR OPTION...]: the torch ops on these kernels; of the tests, those that `chosen` says.
  chosen=()
  lean=(-p no:hypothesispytest)  # takes seconds to start in each process, and nothing below needs it
  sm90() {
    local name=$1 report=$2 command=() workers=(-p no:xdist)  # one process where there is one GPU
    shift 2
    [ -n "$launcher" ] && command=(env FPSATTN_SM90_ON_HOST=1 HOPPER_EMU_OPTS="$*" "$launcher" run --) workers=("${parallel[@]}")
    PYTHONPATH="$build/package" suite "$name" "$report" "${command[@]}" "${tests[@]}" "${lean[@]}" "${workers[@]}" "${chosen[@]}" tests/python/test_sm90_*.py \
      --junit-xml="$results/$report"
  }
  sm90 "kernels, torch ops" sm90.xml --async=lazy
  chosen=(-k "test_sm90_ops and ((accurate or backward_equals) and dtype0 or huge)")  # sums on tensor cores, of one type of inputs
  [ -n "$launcher" ] && [ $quick = no ] &&
    sm90 "kernels, torch ops, truncated sums" sm90_truncated.xml --async=random --seed=5 --fp8-acc=truncated

  if [ $quick = no ]; then
    tools=$(dirname "$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")")
    if ! [ -x "$tools/cuobjdump" ] || ! [ -x "$tools/nvdisasm" ]; then
      tools=$("$python" cmake/cuda_wheels.py build/disassemblers --disassemblers)/bin:$tools
    fi
    export FPSATTN_BUILD_DIR="$build/package" FPSATTN_PTXAS_CACHE="${FPSATTN_PTXAS_CACHE:-$PWD/build/ptxas}"
    PATH="$tools:$PATH" PYTHONPATH="$build/package" suite "kernels, machine code; tools" static.xml \
      "${tests[@]}" "${lean[@]}" "${parallel[@]}" tools tests/static \
      --junit-xml="$results/static.xml"
  fi
fi

if [ $built = 0 ] && [ $quick = no ]; then
  suite "C++" ctest.xml ctest --test-dir "$build" --output-on-failure -j "$jobs" --output-junit "$results/ctest.xml"
fi

step "summary"
[ $quick = yes ] && echo "not run, because of --quick: tests marked slow, C++ programs, machine code and the tools' own tests, all modes of the emulator but lazy"
"$python" tests/summary.py "$results"
