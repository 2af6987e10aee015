#!/bin/sh
# Builds and runs the emulator's own tests. Needs nvcc (CUDA 13) and a built emulator.
set -u
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
emu=$here/../bin/hopper-emu
for c in "${CUDA_HOME:-}" /usr/local/cuda-13.0 /usr/local/cuda; do [ -n "$c" ] && [ -x "$c/bin/nvcc" ] && CUDA_HOME=$c && break; done
out=${OUT:-$here/../../../build/hopper-emu/tests}
mkdir -p "$out"
fail=0
for t in t_basic t_wgmma t_tma t_pipeline t_bugs; do
  if [ ! -x "$out/$t" ] || [ "$here/$t.cu" -nt "$out/$t" ] || [ "$here/common.cuh" -nt "$out/$t" ]; then
    "$CUDA_HOME/bin/nvcc" -std=c++17 -O2 -lineinfo -cudart shared -gencode 'arch=compute_90a,code=[compute_90a,sm_90a]' -o "$out/$t" "$here/$t.cu" || exit 1
  fi
done
for m in eager lazy random; do
  for t in t_basic t_wgmma t_tma t_pipeline; do
    "$emu" run --async=$m -- "$out/$t" || { echo "FAILED: $t --async=$m"; fail=1; }
  done
done
for s in 1 2 3 4 5; do "$emu" run --async=random --seed=$s --quantum=7 -- "$out/t_pipeline" >/dev/null || { echo "FAILED: t_pipeline seed $s"; fail=1; }; done
"$emu" run --racecheck --strict-proxy -- "$out/t_pipeline" >/dev/null || { echo "FAILED: t_pipeline racecheck"; fail=1; }
ACC_TOL=2e-3 "$emu" run --fp8-acc=truncated -- "$out/t_wgmma" >/dev/null || { echo "FAILED: t_wgmma truncated accumulation"; fail=1; }
CUDA_HOME=$CUDA_HOME "$emu" run -- python3 "$here/t_ctypes.py" || { echo "FAILED: t_ctypes"; fail=1; }
expect() {  # expect <pattern on stderr/stdout> <case> [options]
  pat=$1; c=$2; shift 2
  log=$("$emu" run "$@" -- "$out/t_bugs" "$c" 2>&1)
  if echo "$log" | grep -q "$pat"; then echo "detected: $c"; else echo "NOT DETECTED: $c"; echo "$log" | head -5; fail=1; fi
}
expect "out of bounds\|not in any allocation" oob_global
expect "not in any allocation" oob_read
expect "misaligned" misaligned
expect "out of bounds" oob_shared
expect "uninitialised" uninit_shared
expect "deadlock" deadlock_mbar
expect "named barrier 1" deadlock_bar
expect "deadlock" wrong_phase
expect "exceeds the 2 pending" over_arrive
expect "not an initialised mbarrier" uninit_mbar
expect "pending tx bytes 4096" tx_mismatch
expect "wrong result\|uninitialised" missing_wait --async=lazy
expect "without an intervening fence.proxy.async" store_no_fence
expect "bulk groups still reading" store_no_wait --async=lazy
expect "without an intervening fence.proxy.async" wgmma_no_proxy_fence
expect "without a preceding wgmma.fence" wgmma_no_fence
expect "before wgmma.wait_group" acc_touched
expect "wrong result" operand_overwritten --async=lazy
expect "not waited for\|before wgmma.wait_group" wgmma_no_wait
expect "races" race --racecheck
expect "outside the cluster" bad_multicast
expect "earlier bulk store may still be reading" store_source_overwritten --async=lazy
expect "still in flight" load_not_waited --async=lazy
expect "operand B of a wgmma" load_over_wgmma --async=lazy
expect "executed twice" double_cluster_arrive
expect "has not completed" missing_wait --async=lazy
expect "setmaxnreg" setmaxnreg
"$emu" run --racecheck --strict-proxy -- "$out/t_bugs" wgmma_ok 2>&1 | grep -q "wgmma_ok: launch succeeded" && echo "clean: wgmma_ok" || { echo "FAILED: false positive in wgmma_ok"; fail=1; }
[ $fail = 0 ] && echo "all emulator tests passed" || echo "SOME TESTS FAILED"
exit $fail
