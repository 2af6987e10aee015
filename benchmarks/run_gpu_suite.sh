#!/bin/sh
# benchmarks/run_gpu_suite.sh [--quick|--full|--dry-run] [--out DIR] ...: checks and measures everything in one run.
# --help lists the options, benchmarks/README.md explains them. PYTHON chooses the interpreter.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "run_gpu_suite.sh: no $python: set PYTHON to an interpreter that has torch" >&2; exit 2; }
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
exec "$python" -m benchmarks.suite "$@"
