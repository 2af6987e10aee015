"""``fpsattn doctor``: what is here, what works, what is missing, and the exact command that mends it.

Nothing is imported at the top that a broken installation could break, and whatever an examination raises becomes a finding, so the
doctor itself never fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import typer
from rich.text import Text

from .output import JsonOption, print_json, print_table, stdout

Status = Literal["ok", "info", "warn", "fail"]
STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}
MIN_TORCH = "2.10"  # torch's stable ABI as used by fpsattn_torch
KERNEL_CAPABILITY = (9, 0)  # sm_90a code runs on compute capability 9.0 only
# Half an e4m3 step is 2^-4 = 0.0625 of a value: what rounding q, k, v and P can cost, with room for a small sample.
SELF_CHECK_REL_L1 = 0.08
REINSTALL = "in the source folder: pip install --force-reinstall --no-deps ."
OPTIONAL_PACKAGES = {  # distribution: (what it is for, extra that installs it)
    "diffusers": ("fps.apply, demo", "diffusers"),
    "transformers": ("diffusers' Wan pipelines", "diffusers"),
    "safetensors": ("record, analyze", "diffusers"),
    "matplotlib": ("pictures", "demo"),
    "scikit-image": ("PSNR and SSIM", "demo"),
    "imageio": ("videos", "demo"),
    "imageio-ffmpeg": ("videos", "demo"),
    "accelerate": ("train", "train"),
    "peft": ("LoRA training", "train"),
}


@dataclass(frozen=True)
class Check:
    """One finding. `fix` is a command or a sentence to follow; None where nothing is to be done."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Report:
    checks: list[Check]
    usable: bool
    verdict: str

    @property
    def exit_code(self) -> int:
        return 0 if self.usable else 1

    def to_dict(self) -> dict[str, Any]:
        return {"usable": self.usable, "verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


def command(as_json: JsonOption = False) -> None:
    """Say what is installed, what works, what is missing, and the command that mends it."""
    report = examine()
    if as_json:
        print_json(report.to_dict())
        raise typer.Exit(report.exit_code)
    console = stdout()
    rows: list[list[str | Text]] = [
        [check.name, Text(check.status, STYLES[check.status]), Text(check.detail)] for check in report.checks
    ]
    print_table(console, "fpsattn doctor", ("check", "status", "finding"), rows, fold="finding")
    for check in report.checks:
        if check.fix:
            console.print(f"[{STYLES[check.status]}]{check.status}[/] {check.name}: ", end="")
            console.print(check.fix, markup=False)  # one line: it is there to be copied
    console.print(report.verdict, style="bold green" if report.usable else "bold red")
    raise typer.Exit(report.exit_code)


def examine() -> Report:
    """Look at everything. Never raises."""
    checks = [Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    for name, examination, fix in (
        ("torch", _torch, "pip install 'torch>=2.10'"),
        ("GPU", _gpu, "reinstall the NVIDIA driver (>= 550)"),
        ("extension _C", _extension, REINSTALL),
        ("torch ops", _ops, REINSTALL),
        ("attention on cpu", lambda: _attention("cpu"), REINSTALL),
        ("attention on cuda", lambda: _attention("cuda"), REINSTALL),
        ("packages", _packages, REINSTALL),
    ):
        checks += _guarded(name, examination, fix)
        if name == "torch" and checks[-1].status == "fail":
            checks += [*_guarded("extension _C", _extension, REINSTALL), *_packages()]
            break  # nothing of the rest can work, and torch must come first
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        verdict = f"broken: {', '.join(failed)}. Follow the first fix above, then run fpsattn doctor again"
    elif any(check.name == "attention on cuda" and check.status == "ok" for check in checks):
        verdict = "usable: sm_90a kernels on the GPU, and the CPU implementation"
    elif _guarded("", _hopper_here, ""):
        verdict = "usable on the CPU only: a Hopper GPU is here, but its kernels do not run (see the warnings)"
    else:
        verdict = "usable on the CPU; the sm_90a kernels need a Hopper GPU"
    return Report(checks, not failed, verdict)


def _guarded(name: str, examination: Callable[[], Iterator[Check]], fix: str) -> list[Check]:
    """What ``examination`` finds; an exception of a broken installation is a finding too."""
    found = []
    try:
        for check in examination():
            found.append(check)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # Without a GPU the package is usable.
        status: Status = "warn" if name in ("GPU", "attention on cuda") else "fail"
        found.append(Check(name, status, f"{type(error).__name__}: {lines[0] if lines else 'no message'}", fix))
    return found


def _torch() -> Iterator[Check]:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.torch_version.TorchVersion(torch.__version__) < MIN_TORCH:
        yield Check(
            "torch", "fail", f"{torch.__version__} ({build}), expected >= {MIN_TORCH}", "pip install -U 'torch>=2.10'"
        )
    else:
        yield Check("torch", "ok", f"{torch.__version__} ({build})")


def _devices() -> list[Any]:
    """torch's properties of the GPUs that it can use."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_properties(index) for index in range(count)]


def _is_hopper(device: Any) -> bool:
    return (device.major, device.minor) == KERNEL_CAPABILITY


def _hopper_here() -> Iterator[Check]:
    if any(map(_is_hopper, _devices())):
        yield Check("GPU", "ok", "Hopper")


def _gpu() -> Iterator[Check]:
    import torch
    from torch.utils import collect_env

    devices = _devices()
    if devices:
        names = ", ".join(f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices)
        if any(map(_is_hopper, devices)):
            yield Check("GPU", "ok", names)
        else:
            yield Check(
                "GPU", "warn", f"{names}: the kernels are for Hopper (sm_90) only",
                'use an H100, H200, H800 or H20; on this machine run CPU tensors, or fps.attention(..., backend="reference")',
            )  # fmt: skip
    seen, driver = collect_env.get_gpu_info(collect_env.run), collect_env.get_nvidia_driver_version(collect_env.run)
    if not devices and seen and not torch.version.cuda:
        yield Check(
            "GPU", "warn", f"{seen}, but torch is a CPU build",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130; then " + REINSTALL,
        )  # fmt: skip
    elif not devices and seen:
        yield Check(
            "GPU", "warn", f"{seen}, but torch cannot use it",
            "update the NVIDIA driver to one that supports torch's CUDA, and check CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    elif not devices:
        yield Check("GPU", "info", "none found: the CPU implementation is used")
    if driver:
        yield Check("driver", "ok", driver)
    nvcc = collect_env.get_running_cuda_version(collect_env.run)
    yield Check("nvcc", "ok" if nvcc else "info", nvcc or "none on the PATH (needed only to build)")


def _extension() -> Iterator[Check]:
    info = importlib.import_module("fpsattention._C").build_info()
    yield Check("extension _C", "ok", ", ".join(f"{key} {value}" for key, value in info.items()))
    if not info["cuda"]:
        yield Check(
            "sm_90a kernels", "info", f"not built: {info['cuda_reason']}",
            f"on a machine with a Hopper GPU, {REINSTALL.replace('pip', 'FPSATTN_BUILD_CUDA=ON pip')}",
        )  # fmt: skip
    elif info["ptx_only"]:
        text = "built as PTX only: the driver compiles them at first use, slowly"
        yield Check("sm_90a kernels", "warn", text, REINSTALL.replace("pip", "FPSATTN_PTX_ONLY= pip"))
    else:
        yield Check("sm_90a kernels", "ok", f"built ({info['cuda_reason']})")


def _ops() -> Iterator[Check]:
    missing = importlib.import_module("fpsattention.ops.core").sm90_missing()
    yield Check("torch ops", "ok", "registered")
    if missing is None:
        yield Check("sm_90a ops", "ok", "loaded")
    elif any(map(_is_hopper, _devices())):
        yield Check(
            "sm_90a ops", "warn", missing,
            f"pip install nvidia-cuda-runtime (where libcudart is named as missing); else {REINSTALL}",
        )  # fmt: skip
    else:
        yield Check("sm_90a ops", "info", missing)


def _attention(device: str) -> Iterator[Check]:
    """One small ``fps.attention``; relative L1 against dense FP64 attention of the same inputs."""
    import torch

    import fpsattention as fps

    from ..analysis.metrics import compare

    if device == "cuda" and not any(map(_is_hopper, _devices())):
        return
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5 * 6 * 7, 2, 64, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    out = fps.attention(q, k, v, grid=(5, 6, 7))
    assert isinstance(out, torch.Tensor)  # no LSE was asked for
    q64, k64, v64 = (x.transpose(1, 2).to(torch.float64) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q64, k64, v64).transpose(1, 2)
    error = float(compare(out, dense)["rel_l1"])
    if error <= SELF_CHECK_REL_L1:  # false for NaN
        yield Check(f"attention on {device}", "ok", f"runs; relative L1 {error:.4f} against dense FP64 (FP8 rounding)")
    else:
        text = f"runs, but is wrong: relative L1 {error:.4f} against FP64, at most {SELF_CHECK_REL_L1} expected"
        yield Check(f"attention on {device}", "fail", text, "report this with the output of fpsattn doctor --json")


def _packages() -> Iterator[Check]:
    yield Check("fpsattention", "ok", importlib.import_module("fpsattention").__version__)
    for name, (purpose, extra) in OPTIONAL_PACKAGES.items():
        try:
            yield Check(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "info", f"not installed (for {purpose})", f'pip install "fpsattention[{extra}]"')
