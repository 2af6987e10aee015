"""What tools/sasstime predicts for the main loops of the library that is measured. No GPU: it plays the SASS on a model of one SM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fpsattention.ops.core import library_dir

from .plugin import REPOSITORY

SASSTIME = REPOSITORY / "tools/sasstime"
# (head dim, granularity) of the rows of bench_kernels and bench_peers that stand beside each. Every tile there has two blocks or
# more, so that clusters run at D = 128.
KERNELS = {
    "fpsattn_forward_d128_clusters": (128, "tile"), "fpsattn_forward_d128": (128, "tile, no clusters"),
    "fpsattn_forward_d64": (64, "tile"),
    "fpsattn_forward_d128_k_per_token": (128, "token"), "fpsattn_forward_d64_k_per_token": (64, "token"),
    "fpsattn_backward_fast_d128": (128, "backward, fast"), "fpsattn_backward_fast_d64": (64, "backward, fast"),
    # The two kernels of deterministic mode, one after the other (tables.Report.predicted_kernel)
    "fpsattn_backward_dkdv_d128": (128, "backward, dK and dV"), "fpsattn_backward_dkdv_d64": (64, "backward, dK and dV"),
    "fpsattn_backward_dq_d128": (128, "backward, dQ"), "fpsattn_backward_dq_d64": (64, "backward, dQ"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_predicted(kernel: str, record, request) -> None:
    library: Path = request.config.option.library or library_dir() / "libfpsattn.so"
    if not SASSTIME.is_dir() or not library.exists():
        pytest.skip(f"no {SASSTIME if library.exists() else library}")
    run = subprocess.run(
        [sys.executable, SASSTIME, library, "-d", kernel, "--gpu", "h200", "--json"], capture_output=True, text=True, timeout=200
    )  # fmt: skip
    if run.returncode == 2 and "sassbudget --setup" in run.stderr + run.stdout:
        pytest.skip("no disassemblers: pip install nvidia-cuda-nvdisasm nvidia-cuda-cuobjdump")
    assert run.returncode == 0, run.stderr[-2000:]
    (prediction,) = json.loads(run.stdout)
    head_dim, granularity = KERNELS[kernel]
    record(
        "prediction", kernel=kernel, head_dim=head_dim, granularity=granularity, clocks=prediction["clocks"],
        tflops=prediction["tflops_loop"], tensor_utilization=prediction["tensor_utilization"],
    )  # fmt: skip
