#!/bin/sh
# benchmarks/run_gpu_suite.sh [--full|--dry-run] [--out FILE.jsonl [--resume]] [-k EXPRESSION] ...: checks and measures everything
# in one run. benchmarks/README.md explains the options; all of pytest's work too. PYTHON chooses the interpreter.
set -eu
cd "$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
python=${PYTHON:-python3}
for module in torch pytest xdist; do
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" || {
    echo "run_gpu_suite.sh: $python has no $module: pip install torch 'pytest>=9' pytest-xdist, or set PYTHON" >&2; exit 2; }
done
# An installed package has the built kernels: the tree's own is used only where there is none.
"$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('fpsattention') is None)" || PYTHONPATH="python${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "$python" -m pytest -c benchmarks/pytest.ini --rootdir . "$@"
