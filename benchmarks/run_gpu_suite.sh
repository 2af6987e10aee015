#!/bin/sh
# benchmarks/run_gpu_suite.sh [--full|--dry-run] [--out FILE.jsonl [--resume]] [-k EXPRESSION] ...: checks and measures everything
# in one run. benchmarks/README.md explains the options; all of pytest's work too. PYTHON chooses the interpreter.
set -eu
cd "$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)"
python=${PYTHON:-python3}
missing=$("$python" -c "
from importlib.util import find_spec
print(*(name for name in ('torch', 'pytest', 'xdist', 'fpsattention') if find_spec(name) is None))")
case " $missing " in *" torch "* | *" pytest "* | *" xdist "*)
  echo "run_gpu_suite.sh: $python lacks $missing: pip install torch 'pytest>=9' pytest-xdist, or set PYTHON" >&2; exit 2 ;;
esac
# An installed package has the built kernels: the tree's own is used only where there is none.
case " $missing " in *" fpsattention "*) PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" ;; esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
case " $* " in *" --full "*) set -- -o faulthandler_timeout=480 "$@" ;; esac  # a step of all 40 layers takes its time
exec "$python" -m pytest -c benchmarks/pytest.ini --rootdir . "$@"
