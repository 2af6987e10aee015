"""The doctor on broken installations: it names the fault, gives a command, and never raises.

What can be broken for real is: a copy of the package with parts missing or spoiled, torch hidden, a machine with another GPU's
``nvidia-smi``. Only GPUs that torch sees are made up.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fpsattention as fps
from fpsattention.cli import app, doctor

PACKAGE = Path(fps.__file__).parent
HIDE_TORCH = "import sys; sys.modules['torch'] = None\n"  # makes `import torch` an ImportError, whatever is installed


@pytest.fixture
def copy(tmp_path):
    """A copy of the installed package, to be broken; its folder."""
    folder = tmp_path / "site" / "fpsattention"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def examine(package, start="", path=None):
    """`fpsattn doctor --json` of ``package`` in a process of its own, after the Python code ``start``: (exit status, report)."""
    code = start + "import sys; sys.argv = ['fpsattn', 'doctor', '--json']; from fpsattention.cli import app; app()"
    env = {**os.environ, "PYTHONPATH": str(package.parent), "PATH": path or os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=package.parent, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def find(report, name):
    return next(check for check in report["checks"] if check["name"] == name)


@pytest.mark.slow
def test_healthy():
    status, report = examine(PACKAGE)
    assert status == 0 and report["usable"], report
    assert find(report, "attention on cpu")["status"] == "ok" and find(report, "torch ops")["status"] == "ok"


@pytest.mark.slow
def test_without_torch(copy):
    status, report = examine(copy, HIDE_TORCH)
    found = find(report, "torch")
    assert status == 1 and found["status"] == "fail" and shlex.split(found["fix"]) == ["pip", "install", "torch>=2.10"]
    assert find(report, "extension _C")["status"] == "ok"
    assert "Follow the first fix" in report["verdict"] and [
        c["name"] for c in report["checks"] if c["status"] == "fail"
    ] == ["torch"]


@pytest.mark.slow
def test_parts_that_are_missing_or_spoiled(copy):
    next(copy.glob("_C*.so")).unlink()
    status, report = examine(copy)
    assert status == 1
    for name in ("extension _C", "attention on cpu"):
        assert find(report, name)["status"] == "fail" and "pip install" in find(report, name)["fix"]
    (copy / "lib" / "libfpsattn_torch.so").write_bytes(b"not a library")
    _, report = examine(copy)
    assert (
        find(report, "torch ops")["status"] == "fail" and "libfpsattn_torch.so" in find(report, "torch ops")["detail"]
    )
    shutil.rmtree(copy / "lib")
    _, report = examine(copy)
    assert "never built" in find(report, "torch ops")["detail"]


@pytest.mark.slow
def test_the_driver_sees_a_gpu_that_torch_does_not(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H100 (UUID: GPU-1)" || echo "| Driver Version: 580.1  CUDA |"\n'
    )
    smi.chmod(0o755)
    _, report = examine(PACKAGE, path=f"{tmp_path}:{os.environ['PATH']}")
    assert find(report, "driver")["detail"] == "580.1"
    if not torch.cuda.is_available():
        found = find(report, "GPU")
        assert found["status"] == "warn" and "NVIDIA H100" in found["detail"] and "UUID" not in found["detail"]


def device(name, major, minor):
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30)


def checks(examination):
    return {check.name: check for check in examination()}


def test_gpus_that_torch_sees(monkeypatch):
    monkeypatch.setattr(doctor, "_devices", lambda: [device("NVIDIA A100", 8, 0)])
    found = checks(doctor._gpu)["GPU"]
    assert found.status == "warn" and "sm_80" in found.detail and "Hopper" in found.detail
    monkeypatch.setattr(doctor, "_devices", lambda: [device("NVIDIA H100", 9, 0)])
    assert checks(doctor._gpu)["GPU"].status == "ok"
    from fpsattention.ops import core

    monkeypatch.setattr(core, "_kernels_missing", "libcudart.so.13: cannot open shared object file")
    found = checks(doctor._ops)["sm_90a ops"]
    assert found.status == "warn" and "libcudart.so.13" in found.detail and "nvidia-cuda-runtime" in found.fix


def test_kernels_of_another_cuda_are_not_loaded():
    from fpsattention.ops.core import other_cuda

    assert other_cuda("13.0.88", "13.2") is other_cuda("", "12.8") is other_cuda("13.0.88", None) is None
    assert "built with CUDA 13.0.88 but torch runs with CUDA 12.8" in other_cuda("13.0.88", "12.8")


def test_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    found = checks(doctor._torch)["torch"]
    assert found.status == "fail" and "2.9.1" in found.detail and "-U" in found.fix


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_wrong_numbers_are_broken(monkeypatch, value):
    monkeypatch.setattr(fps, "attention", lambda q, *_, **__: torch.full_like(q, value))
    report = doctor.examine()
    found = find(report.to_dict(), "attention on cpu")
    assert not report.usable and found["status"] == "fail" and "wrong" in found["detail"]


def test_optional_package(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL_PACKAGES, "no-such-distribution", ("a test", "demo"))
    found = checks(doctor._packages)["no-such-distribution"]
    assert found.status == "info" and found.fix == 'pip install "fpsattention[demo]"'


def test_table(monkeypatch):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "usable" in result.stdout and "attention on cpu" in result.stdout
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "pip install -U 'torch>=2.10'" in result.stdout
