"""`fpsattn doctor`: what is here, what works, what is missing, and the exact command that mends it.

Every `probe_*` function looks at one thing and may raise; `examine` turns whatever happens into a `Check`, so the doctor
itself never fails. Nothing is imported at the top that a broken installation could break.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "info", "warn", "fail"]
MIN_TORCH = (2, 10)  # torch's stable ABI as used by fpsattn_torch
KERNEL_CAPABILITY = (9, 0)  # sm_90a code runs on compute capability 9.0 only
# Relative L1 against FP64 that design section 3 allows for normal inputs, with room for a small sample.
SELF_CHECK_REL_L1 = 0.08
REINSTALL = "pip install --force-reinstall --no-deps ."
OPTIONAL_PACKAGES = {  # distribution: (what it is for, extra that installs it)
    "diffusers": ("fps.apply, demo", "diffusers"),
    "transformers": ("diffusers' Wan pipelines", "diffusers"),
    "safetensors": ("record, analyze", "diffusers"),
    "matplotlib": ("pictures", "demo"),
    "scikit-image": ("PSNR and SSIM", "demo"),
    "imageio": ("videos", "demo"),
    "imageio-ffmpeg": ("videos", "demo"),
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


# ---------------------------------------------------------------------------------------------------------- probes


def probe_torch() -> dict[str, Any]:
    """Version, the CUDA it was built for (None: a CPU build), whether CUDA runs, and its devices."""
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "capability": (properties.major, properties.minor),
                    "memory_gib": properties.total_memory / 2**30,
                    "multiprocessors": properties.multi_processor_count,
                }
            )
    return {"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}


def probe_package() -> str:
    """Version of fpsattention, after importing all of it."""
    module = importlib.import_module("fpsattention")
    importlib.import_module("fpsattention.ops.core")
    return str(getattr(module, "__version__", None) or importlib.metadata.version("fpsattention"))


def probe_build_info() -> dict[str, Any]:
    """What the compiled part says about itself."""
    return dict(importlib.import_module("fpsattention._C").build_info())


def probe_library_dir() -> Path:
    """Folder of the compiled libraries, without importing what a broken one would break."""
    return Path(__file__).resolve().parents[1] / "lib"


def probe_load(path: Path) -> None:
    """Load a shared library; OSError with the linker's text where that fails."""
    ctypes.CDLL(str(path))


def probe_sm90_missing() -> str | None:
    """Why the sm_90a kernels cannot be called in this process, or None."""
    reason = importlib.import_module("fpsattention.ops.core").sm90_missing()
    return None if reason is None else str(reason)


def probe_ops() -> list[str]:
    """Names of the registered ops among those the package needs; import errors pass through."""
    import torch

    importlib.import_module("fpsattention.ops.core")
    return [n for n in ("quantize", "forward", "backward", "attention") if hasattr(torch.ops.fpsattn, n)]


def probe_driver() -> dict[str, Any] | None:
    """GPUs as the NVIDIA driver sees them, without torch; None where there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if run.returncode != 0:
        raise RuntimeError((run.stderr or run.stdout).strip() or f"nvidia-smi exited with status {run.returncode}")
    rows = [[cell.strip() for cell in line.split(",")] for line in run.stdout.splitlines() if line.strip()]
    return {
        "driver": rows[0][1] if rows else "",
        "gpus": [f"{r[0]} (compute {r[2]}, {r[3]})" for r in rows if len(r) > 3],
    }


def probe_cuda_runtime() -> tuple[int, int]:
    """Version of the CUDA runtime in this process (or on the linker's path) as (major, minor); OSError where absent."""
    names = ["libcudart.so.13", "libcudart.so.12", ctypes.util.find_library("cudart") or ""]
    errors = []
    for name in filter(None, names):
        try:
            runtime = ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
            continue
        version = ctypes.c_int()
        runtime.cudaRuntimeGetVersion(ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10
    raise OSError("; ".join(errors) or "no libcudart on the linker's path")


def probe_nvcc() -> str | None:
    """Release of nvcc (`13.0`) with its path, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    tool = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if tool is None:
        return None
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    release = re.search(r"release (\S+?),", text)
    return f"{release.group(1) if release else 'unknown release'} ({tool})"


def probe_distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe_attention(device: str) -> float:
    """Run one small `fps.attention` on `device`; relative L1 against dense FP64 attention of the same inputs."""
    import torch

    import fpsattention as fps

    from ..analysis.metrics import compare

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5 * 6 * 7, 2, 64, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    out = fps.attention(q, k, v, grid=(5, 6, 7))
    assert isinstance(out, torch.Tensor)  # no LSE was asked for
    q64, k64, v64 = (x.transpose(1, 2).to(torch.float64) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(q64, k64, v64).transpose(1, 2)
    return float(compare(out, dense)["rel_l1"])


# ---------------------------------------------------------------------------------------------------------- findings


def _try(probe: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """(result, None) or (None, what went wrong in one line)."""
    try:
        return probe(*args), None
    except Exception as error:  # whatever a broken installation throws becomes a line of the report
        lines = [line for line in str(error).splitlines() if line.strip()]
        return None, f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])


def _check_torch(torch_info: dict[str, Any] | None, error: str | None) -> Check:
    if torch_info is None:
        return Check("torch", "fail", str(error), "pip install 'torch>=2.10'")
    cuda = f"built for CUDA {torch_info['cuda']}" if torch_info["cuda"] else "CPU build"
    if _version_tuple(torch_info["version"]) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        return Check(
            "torch", "fail", f"{torch_info['version']} ({cuda}), wanted >= {wanted}", "pip install -U 'torch>=2.10'"
        )
    return Check("torch", "ok", f"{torch_info['version']} ({cuda})")


def _check_gpu(driver: dict[str, Any] | None, driver_error: str | None, torch_info: dict[str, Any] | None) -> Check:
    devices = (torch_info or {}).get("devices") or []
    if devices:
        names = ", ".join(
            f"{d['name']} (sm_{d['capability'][0]}{d['capability'][1]}, {d['memory_gib']:.0f} GiB)" for d in devices
        )
        if any(tuple(d["capability"]) == KERNEL_CAPABILITY for d in devices):
            return Check("GPU", "ok", names)
        return Check(
            "GPU", "warn", f"{names}: the kernels are for Hopper (sm_90) only",
            "use an H100, H200, H800 or H20; on this machine run CPU tensors, or fps.attention(..., backend=\"reference\")",
        )  # fmt: skip
    if driver_error:
        return Check(
            "GPU",
            "warn",
            f"nvidia-smi does not work: {driver_error}",
            "reboot, or reinstall the NVIDIA driver (>= 550)",
        )
    if driver is None or not driver["gpus"]:
        return Check("GPU", "info", "none found: the CPU implementation is used")
    seen = ", ".join(driver["gpus"])
    if torch_info is not None and not torch_info["cuda"]:
        return Check(
            "GPU", "warn", f"{seen}, but torch is a CPU build",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130, then " + REINSTALL,
        )  # fmt: skip
    return Check(
        "GPU", "warn", f"{seen}, but torch cannot use it (driver {driver['driver']})",
        "update the NVIDIA driver to one that supports torch's CUDA, and check CUDA_VISIBLE_DEVICES",
    )  # fmt: skip


def _check_driver(driver: dict[str, Any] | None, error: str | None) -> Check:
    if error:
        return Check("driver", "warn", error, "reinstall the NVIDIA driver (>= 550)")
    if driver is None:
        return Check("driver", "info", "no nvidia-smi")
    return Check("driver", "ok", driver["driver"] or "present")


def _check_runtime(version: tuple[int, int] | None, error: str | None, has_gpu: bool) -> Check:
    if version is not None:
        return Check("CUDA runtime", "ok", f"{version[0]}.{version[1]}")
    status: Status = "warn" if has_gpu else "info"
    fix = "pip install nvidia-cuda-runtime (it comes with a CUDA build of torch)" if has_gpu else None
    return Check("CUDA runtime", status, f"not found ({error})", fix)


def _check_extension(info: dict[str, Any] | None, error: str | None) -> Check:
    if info is None:
        return Check(
            "extension _C", "fail", f"not importable ({error})",
            f"in the source tree: {REINSTALL} (an editable install: pip install -e .)",
        )  # fmt: skip
    return Check("extension _C", "ok", ", ".join(f"{key} {value}" for key, value in info.items()))


def _check_kernels(info: dict[str, Any] | None, has_gpu: bool) -> Check | None:
    if info is None:
        return None
    if info.get("cuda"):
        if info.get("ptx_only"):
            return Check(
                "sm_90a kernels", "warn", "built as PTX only: the driver compiles them at first use, slowly",
                f"FPSATTN_PTX_ONLY= {REINSTALL}",
            )  # fmt: skip
        return Check("sm_90a kernels", "ok", f"built ({info.get('cuda_reason', 'nvcc')})")
    reason = str(info.get("cuda_reason", "no reason recorded"))
    fix = (
        "install the CUDA toolkit (>= 12.4), then: CUDA_HOME=/usr/local/cuda FPSATTN_BUILD_CUDA=ON " + REINSTALL
        if "nvcc" in reason or "OFF" in reason
        else f"FPSATTN_BUILD_CUDA=ON {REINSTALL}"
    )
    return Check("sm_90a kernels", "warn" if has_gpu else "info", f"not built: {reason}", fix)


def _check_libraries(has_cuda_build: bool, has_gpu: bool) -> list[Check]:
    folder, error = _try(probe_library_dir)
    if folder is None:
        return [Check("libraries", "fail", f"their folder is unknown ({error})", f"in the source tree: {REINSTALL}")]
    checks = []
    wanted = ["libfpsattn_torch.so", *(["libfpsattn.so", "libfpsattn_torch_cuda.so"] if has_cuda_build else [])]
    for name in wanted:
        path = folder / name
        if not path.exists():
            checks.append(Check(name, "fail", f"missing in {folder}", f"in the source tree: {REINSTALL}"))
            continue
        # The torch libraries take their symbols from torch, which loads them when the ops are registered: checked below.
        _, load_error = _try(probe_load, path) if name == "libfpsattn.so" else (None, None)
        if load_error is None:
            checks.append(Check(name, "ok", str(path)))
        elif has_gpu:
            missing = re.search(r"(lib\S+?\.so[.\d]*): cannot open", load_error)
            library = missing.group(1) if missing else "the library named above"
            checks.append(
                Check(
                    name,
                    "warn",
                    f"{path} does not load ({load_error})",
                    f"put {library} on the linker's path: pip install nvidia-cuda-runtime, or add the CUDA toolkit's lib64 to "
                    f"LD_LIBRARY_PATH, or rebuild with the toolkit of torch's CUDA version: {REINSTALL}",
                )  # fmt: skip
            )
        else:
            checks.append(Check(name, "info", f"{path} does not load without a CUDA runtime ({load_error})"))
    if has_cuda_build:
        reason, reason_error = _try(probe_sm90_missing)
        if reason or reason_error:
            status: Status = "warn" if has_gpu else "info"
            checks.append(Check("sm_90a ops", status, reason or reason_error or "", f"in the source tree: {REINSTALL}"))
        else:
            checks.append(Check("sm_90a ops", "ok", "loaded"))
    return checks


def _check_ops(ops: list[str] | None, error: str | None) -> Check:
    wanted = ["quantize", "forward", "backward", "attention"]
    if ops is None:
        return Check("torch ops", "fail", f"not registered ({error})", f"in the source tree: {REINSTALL}")
    missing = [name for name in wanted if name not in ops]
    if missing:
        return Check("torch ops", "fail", f"missing: {', '.join(missing)}", f"in the source tree: {REINSTALL}")
    return Check("torch ops", "ok", ", ".join(f"fpsattn::{name}" for name in ops))


def _check_attention(device: str) -> Check:
    error, failure = _try(probe_attention, device)
    name = f"attention on {device}"
    if failure is not None:
        return Check(name, "fail" if device == "cpu" else "warn", failure, f"in the source tree: {REINSTALL}")
    if not error <= SELF_CHECK_REL_L1:  # also catches NaN
        text = f"runs, but is wrong: relative L1 {error:.4f} against FP64, at most {SELF_CHECK_REL_L1} expected"
        return Check(
            name, "fail" if device == "cpu" else "warn", text, "report this with the output of fpsattn doctor --json"
        )
    return Check(name, "ok", f"runs; relative L1 {error:.4f} against dense FP64 (FP8 rounding)")


def _check_optional() -> list[Check]:
    checks = []
    for name, (purpose, extra) in OPTIONAL_PACKAGES.items():
        version, error = _try(probe_distribution, name)
        if version is not None:
            checks.append(Check(name, "ok", version))
        else:
            detail = error or f"not installed (for {purpose})"
            checks.append(Check(name, "info", detail, f'pip install "fpsattention[{extra}]"'))
    return checks


def examine() -> Report:
    """Look at everything. Never raises."""
    checks = [Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    torch_info, torch_error = _try(probe_torch)
    driver, driver_error = _try(probe_driver)
    has_gpu = bool((torch_info or {}).get("devices")) or bool(driver and driver["gpus"])
    checks.append(_check_torch(torch_info, torch_error))
    checks.append(_check_gpu(driver, driver_error, torch_info))
    checks.append(_check_driver(driver, driver_error))
    checks.append(_check_runtime(*_try(probe_cuda_runtime), has_gpu))
    nvcc, nvcc_error = _try(probe_nvcc)
    checks.append(
        Check("nvcc", "ok", nvcc) if nvcc else Check("nvcc", "info", nvcc_error or "none (needed only to build)")
    )

    version, package_error = _try(probe_package)
    if version is None:
        checks.append(Check("fpsattention", "fail", str(package_error), f"in the source tree: {REINSTALL}"))
    else:
        checks.append(Check("fpsattention", "ok", version))
    info, info_error = _try(probe_build_info)
    checks.append(_check_extension(info, info_error))
    kernels = _check_kernels(info, has_gpu)
    if kernels is not None:
        checks.append(kernels)
    checks += _check_libraries(bool((info or {}).get("cuda")), has_gpu)
    checks.append(_check_ops(*_try(probe_ops)))
    checks.append(_check_attention("cpu"))
    hopper = any(tuple(d["capability"]) == KERNEL_CAPABILITY for d in (torch_info or {}).get("devices") or [])
    if hopper and (info or {}).get("cuda"):
        checks.append(_check_attention("cuda"))
    checks += _check_optional()
    return _conclude(checks, hopper)


def _conclude(checks: list[Check], hopper: bool) -> Report:
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        return Report(
            checks, False, f"broken: {', '.join(failed)}. Follow the first fix above, then run fpsattn doctor again"
        )
    on_gpu = any(check.name == "attention on cuda" and check.status == "ok" for check in checks)
    if on_gpu:
        return Report(checks, True, "usable: sm_90a kernels on the GPU, and the CPU implementation")
    if hopper:
        return Report(
            checks, True, "usable on the CPU only: a Hopper GPU is here, but its kernels do not run (see the warnings)"
        )
    return Report(checks, True, "usable on the CPU; the sm_90a kernels need a Hopper GPU")
