#!/bin/sh
# build.sh [static|shared] [OUT_DIR]: static (default) carries to another machine; shared is what the CPU emulator needs.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
kind=${1:-static}
out=${2:-$here/../../build/hopper-facts/$kind}
nvcc=${NVCC:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
[ -x "$nvcc" ] || nvcc=nvcc
# -O1 is for host code, which times nothing; device code is compiled at -O3 anyway.
flags="-std=c++20 -O1 -lineinfo -gencode arch=compute_90a,code=[sm_90a,compute_90a] -Xptxas -v --expt-relaxed-constexpr -diag-suppress 186,550,177"
mkdir -p "$out"
command -v python3 >/dev/null && python3 "$here/gen_wgmma.py" | cmp -s - "$here/wgmma.cuh" || echo "note: wgmma.cuh differs from gen_wgmma.py" >&2
jobs=""
for f in main pipes tensor memory numeric; do
  "$nvcc" $flags -c "$here/$f.cu" -o "$out/$f.o" >"$out/$f.log" 2>&1 &
  jobs="$jobs $!"
done
fail=0
for j in $jobs; do wait "$j" || fail=1; done
grep -hE "error[ :]|Potential Performance Loss|[1-9][0-9]* bytes spill" "$out"/*.log || true
[ "$fail" = 0 ] || { cat "$out"/*.log >&2; exit 1; }
"$nvcc" -cudart "$kind" -gencode "arch=compute_90a,code=[sm_90a,compute_90a]" "$out"/*.o -o "$out/hopper-facts" -ldl -lpthread
echo "$out/hopper-facts"
