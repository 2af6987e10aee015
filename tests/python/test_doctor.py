"""The doctor on planted breakages: it names the fault, gives a command, and never raises."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fpsattention.cli import app, doctor

CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "devices": []}
H100 = {"name": "NVIDIA H100", "capability": (9, 0), "memory_gib": 80.0, "multiprocessors": 132}
BUILT = {"version": "0.1.0", "cuda": True, "cuda_reason": "nvcc 13.0", "ptx_only": False}
NOT_BUILT = {"version": "0.1.0", "cuda": False, "cuda_reason": "no nvcc found", "ptx_only": False}


def raises(error):
    def probe(*_):
        raise error

    return probe


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A whole CPU installation, whatever this machine is."""
    for name in ("libfpsattn_torch.so", "libfpsattn_torch_cuda.so", "libfpsattn.so"):
        (tmp_path / name).touch()
    answers = {
        "probe_torch": CPU_TORCH, "probe_package": "0.1.0", "probe_build_info": NOT_BUILT, "probe_library_dir": tmp_path,
        "probe_load": None, "probe_sm90_missing": None, "probe_ops": ["quantize", "forward", "backward", "attention"],
        "probe_driver": None, "probe_cuda_runtime": (13, 0), "probe_nvcc": "13.0 (/x/nvcc)", "probe_distribution": "1.0",
        "probe_attention": 0.05,
    }  # fmt: skip
    for name, value in answers.items():
        monkeypatch.setattr(doctor, name, lambda *_, value=value: value)
    return lambda **probes: [monkeypatch.setattr(doctor, name, probe) for name, probe in probes.items()]


def find(report, name):
    return next(check for check in report.checks if check.name == name)


def test_healthy_cpu(healthy):
    report = doctor.examine()
    assert report.usable and report.exit_code == 0 and "CPU" in report.verdict
    assert not [check for check in report.checks if check.status in ("fail", "warn")]


def test_healthy_gpu(healthy):
    healthy(probe_torch=lambda: {**CPU_TORCH, "cuda": "13.0", "devices": [H100]}, probe_build_info=lambda: BUILT)
    report = doctor.examine()
    assert report.usable and "GPU" in report.verdict
    assert find(report, "attention on cuda").status == "ok"


@pytest.mark.parametrize(
    ("probe", "error", "check"),
    [
        ("probe_torch", ModuleNotFoundError("No module named 'torch'"), "torch"),
        ("probe_package", ImportError("broken"), "fpsattention"),
        ("probe_build_info", ImportError("no _C"), "extension _C"),
        ("probe_ops", OSError("undefined symbol: x"), "torch ops"),
        ("probe_attention", RuntimeError("boom"), "attention on cpu"),
    ],
)
def test_broken_part_fails_with_a_fix(healthy, probe, error, check):
    healthy(**{probe: raises(error)})
    report = doctor.examine()
    found = find(report, check)
    assert not report.usable and report.exit_code == 1
    assert found.status == "fail" and str(error).split(":")[0] in found.detail and "pip install" in found.fix
    assert check in report.verdict


def test_missing_library(healthy, tmp_path):
    (tmp_path / "libfpsattn_torch.so").unlink()
    found = find(doctor.examine(), "libfpsattn_torch.so")
    assert found.status == "fail" and str(tmp_path) in found.detail


def test_cuda_runtime_missing_on_a_gpu_machine(healthy):
    error = OSError("libcudart.so.13: cannot open shared object file: No such file or directory")
    healthy(
        probe_torch=lambda: {**CPU_TORCH, "cuda": "13.0", "devices": [H100]}, probe_build_info=lambda: BUILT,
        probe_load=raises(error), probe_sm90_missing=lambda: str(error), probe_cuda_runtime=raises(error),
        probe_attention=lambda device: 0.05 if device == "cpu" else raises(error)(),
    )  # fmt: skip
    report = doctor.examine()
    assert report.usable and "CPU only" in report.verdict
    assert "libcudart.so.13" in find(report, "libfpsattn.so").fix
    assert find(report, "CUDA runtime").status == "warn"


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_wrong_numbers_are_broken(healthy, value):
    healthy(probe_attention=lambda _: value)
    found = find(doctor.examine(), "attention on cpu")
    assert found.status == "fail" and "wrong" in found.detail


def test_other_gpu_cpu_torch_old_torch(healthy):
    a100 = {**H100, "name": "NVIDIA A100", "capability": (8, 0)}
    healthy(probe_torch=lambda: {**CPU_TORCH, "cuda": "13.0", "devices": [a100]})
    report = doctor.examine()
    assert report.usable and find(report, "GPU").status == "warn" and "sm_90" in find(report, "GPU").detail
    driver = {"driver": "580.1", "gpus": ["NVIDIA H100 (compute 9.0, 81559 MiB)"]}
    healthy(probe_torch=lambda: CPU_TORCH, probe_driver=lambda: driver)
    found = find(doctor.examine(), "GPU")
    assert found.status == "warn" and "CPU build" in found.detail and "pip install" in found.fix
    healthy(probe_driver=raises(RuntimeError("NVML version mismatch")))
    assert "NVML" in find(doctor.examine(), "GPU").detail
    healthy(probe_torch=lambda: {**CPU_TORCH, "version": "2.9.1"})
    assert find(doctor.examine(), "torch").status == "fail"


def test_optional_package(healthy):
    healthy(probe_distribution=lambda name: None if name == "imageio" else "1.0")
    report = doctor.examine()
    assert report.usable and find(report, "imageio").fix == 'pip install "fpsattention[demo]"'


def test_everything_broken_never_raises(monkeypatch):
    for name in dir(doctor):
        if name.startswith("probe_"):
            monkeypatch.setattr(doctor, name, raises(KeyError("x")))
    report = doctor.examine()
    assert not report.usable
    assert json.dumps(report.to_dict())


def test_real_probes_on_this_machine():
    report = doctor.examine()
    assert report.usable, [check for check in report.checks if check.status == "fail"]
    assert find(report, "attention on cpu").status == "ok"


def test_cli(healthy):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and "usable" in result.stdout
    healthy(probe_ops=raises(OSError("gone")))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)["usable"] is False


def test_fix_commands_parse(healthy):
    healthy(probe_torch=raises(ImportError("x")))
    assert shlex.split(find(doctor.examine(), "torch").fix)[:2] == ["pip", "install"]
    assert Path(doctor.__file__).exists()
