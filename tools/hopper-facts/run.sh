#!/bin/sh
# run.sh OUT_DIR [BINARY [ARGS...]]: everything, with a prebuilt binary. Reads the GPU's state, never changes it.
set -u
[ $# -ge 1 ] || { echo "usage: $0 OUT_DIR [BINARY [ARGS...]]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
out=$1; shift
bin=${1:-$here/../../build/hopper-facts/static/hopper-facts}; [ $# -gt 0 ] && shift
[ -x "$bin" ] || { echo "no binary at $bin: run build.sh, or carry one" >&2; exit 2; }
mkdir -p "$out"
smi=$(command -v nvidia-smi || true)
excerpt() { [ -n "$smi" ] && "$smi" -q -d CLOCK,POWER,TEMPERATURE,PERFORMANCE,UTILIZATION,ECC >"$out/$1" 2>&1; }
excerpt nvidia-smi-before.txt
pid=
if [ -n "$smi" ]; then
  "$smi" --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active --format=csv -lms 100 >"$out/nvidia-smi-samples.csv" 2>/dev/null &
  pid=$!
fi
"$bin" --out "$out/facts.json" "$@" >"$out/log.txt" 2>&1
rc=$?
[ -n "$pid" ] && kill "$pid" 2>/dev/null
excerpt nvidia-smi-after.txt
cat "$out/log.txt"
exit $rc
