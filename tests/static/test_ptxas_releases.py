"""Our PTX, assembled by the oldest ptxas that is supported, the newest, and one in between: WGMMAs overlap, nothing spills in a loop. Needs no GPU and no CUDA toolkit.

nvcc of another release writes nearly the same PTX, ptxas makes the machine code of it: so the PTX in libfpsattn, with its
version header lowered to what a release reads, stands for a build with that release. The assemblers are taken from
NVIDIA's wheels and kept in FPSATTN_PTXAS_CACHE (default: ~/.cache/fpsattention/ptxas).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import budgets

# Release of ptxas: the wheel that holds it, and the PTX version that it reads (None: as it comes).
RELEASES = {
    "12.4": ("nvidia-cuda-nvcc-cu12==12.4.*", "8.4"),
    "12.8": ("nvidia-cuda-nvcc-cu12==12.8.*", "8.7"),
    "newest": ("nvidia-cuda-nvcc>=13.1", None),
}

# Kernels by what their mangled name holds, and how many WARPGROUP.DEPBAR (waits for WGMMAs) each has by its source: more means
# serialized.
DEPBARS = {
    "forward_kernelINS1_6ConfigILi128ELb0E": 5,  # first QK; QK and two halves of PV in the loop; last PV
    "forward_kernelINS1_6ConfigILi128ELb1E": 5,
    "forward_kernelINS1_6ConfigILi64ELb0E": 5,
    "forward_kernelINS1_6ConfigILi64ELb1E": 5,
}
for key_scales in "01":
    for dim in (64, 128):  # S; dP; dV and dK
        DEPBARS[f"dkdv_kernelILi{dim}ENS1_10SeparateDqELb{key_scales}E"] = 3
        DEPBARS[f"dkdv_kernelILi{dim}ENS1_9ReducedDqELb{key_scales}E"] = 3
        DEPBARS[f"dq_kernelILi{dim}ELb{key_scales}E"] = 3

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", re.MULTILINE)


def cache_folder() -> Path:
    return Path(os.environ.get("FPSATTN_PTXAS_CACHE", Path.home() / ".cache/fpsattention/ptxas"))


def fetch_ptxas(release: str) -> Path:
    """ptxas of a release; downloaded once."""
    folder = cache_folder() / release
    tool = folder / "ptxas"
    if tool.exists():
        return tool
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    result = subprocess.run([*command, "-d", str(folder), RELEASES[release][0]], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        pytest.skip(f"no ptxas of CUDA {release}: pip download of {RELEASES[release][0]} failed (no network?)")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("bin/ptxas")]
        part = folder / f"ptxas.{os.getpid()}"
        part.write_bytes(wheel.read(name))
    part.chmod(0o755)
    part.rename(tool)  # whole, or not there
    wheels[0].unlink()
    return tool


def lower_version(ptx: str, version: str | None) -> str:
    """The PTX with a version header that an older ptxas accepts."""
    if version is None:
        return ptx
    lowered, count = re.subn(r"^\.version \d+\.\d+", f".version {version}", ptx, flags=re.MULTILINE)
    assert count == 1, "one version header expected"
    return lowered


def functions(sass: str) -> dict[str, str]:
    """SASS of each kernel by mangled name, from cuobjdump -sass."""
    return {part.split("\n", 1)[0].strip(): part for part in sass.split("Function : ")[1:]}


def loop_spills(sass: str) -> list[str]:
    """Local loads and stores inside loops that issue WGMMAs."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    found = []
    for address, text in code:
        branch = re.search(r"\bBRA(?:\.\w+)* (?:\w+, )?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) <= address:
            loop = [other for at, other in code if int(branch[1], 16) <= at <= address]
            # Spin loops of barriers stand behind the end of the kernel and jump back into it: no loops of their own.
            if any("GMMA" in other for other in loop) and "EXIT" not in loop:
                found += [other for other in loop if re.search(r"\b(LDL|STL)\b", other)]
    return found


def problems(name: str, log: str, sass: dict[str, str], depbars: int) -> list[str]:
    """What is wrong with the kernel that `name` stands for."""
    matching = [mangled for mangled in sass if name in mangled]
    if len(matching) != 1:
        return [f"{len(matching)} kernels hold {name}, expected 1"]
    text = sass[matching[0]]
    found = [line for line in log.splitlines() if re.search(r"\(C75\d\d\)", line) and matching[0] in line]
    count = text.count("WARPGROUP.DEPBAR")
    if count != depbars:
        found.append(f"{name}: {count} WARPGROUP.DEPBAR, expected {depbars}: are the WGMMAs serialized?")
    return found + [f"{name}: spill in a loop: {line}" for line in loop_spills(text)]


@pytest.fixture(scope="module")
def ptx_files(tmp_path_factory) -> list[str]:
    """PTX of the translation units that hold kernels of DEPBARS, as libfpsattn embeds it."""
    try:
        binary, cuobjdump = budgets.find_binary(), budgets.find_cuobjdump()
    except budgets.Unavailable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("ptx")
    subprocess.run([cuobjdump, "-xptx", "all", str(binary.resolve())], cwd=folder, check=True, capture_output=True)
    texts = [path.read_text() for path in sorted(folder.glob("*.ptx"))]
    return [text for text in texts if any(name in text for name in DEPBARS)]


@pytest.mark.parametrize(
    "release", [pytest.param(name, marks=() if name == "newest" else pytest.mark.slow) for name in RELEASES]
)
def test_wgmmas_overlap(release, ptx_files, tmp_path):
    ptxas, cuobjdump = fetch_ptxas(release), budgets.find_cuobjdump()
    assert ptx_files
    log, sass = "", {}
    for i, text in enumerate(ptx_files):
        source, cubin = tmp_path / f"{i}.ptx", tmp_path / f"{i}.cubin"
        source.write_text(lower_version(text, RELEASES[release][1]))
        command = [str(ptxas), "-arch=sm_90a", "-O3", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        log += result.stdout + result.stderr
        dump = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True)
        sass.update(functions(dump.stdout))
    assert [line for name, count in DEPBARS.items() for line in problems(name, log, sass, count)] == []


KERNEL = """
        /*0000*/  WARPGROUP.ARRIVE ;
        /*0010*/  QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], !UPT ;
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/  {} ;
        /*0040*/  @P0 BRA 0x0 ;
        /*0050*/  STL [R1], R2 ;
"""


@pytest.mark.parametrize(
    "log, inside, depbars, text",
    [
        ("ptxas info    : (C7515) Potential Performance Loss: ... in the function '_Zk'", "NOP", 1, "C7515"),
        ("", "LDL R2, [R1]", 1, "spill in a loop"),
        ("", "NOP", 2, "expected 2"),
    ],
)
def test_planted_failures_are_found(log, inside, depbars, text):
    assert problems("_Zk", "", {"_Zk": KERNEL.format("NOP")}, 1) == []
    (found,) = problems("_Zk", log, {"_Zk": KERNEL.format(inside)}, depbars)
    assert text in found
    assert problems("_Zother", "", {"_Zk": KERNEL.format("NOP")}, 1) != []


def test_compiler_launcher_fails_on_serialized_wgmmas(tmp_path):
    launcher = Path(__file__).parents[2] / "cmake/nvcc_checked.py"
    output = tmp_path / "out.o"
    compiler = "import sys; open(sys.argv[2], 'w').close(); print({!r}, file=sys.stderr); sys.exit({})"

    def run(message: str, status: int) -> subprocess.CompletedProcess:
        command = [sys.executable, str(launcher), sys.executable, "-c", compiler.format(message, status)]
        return subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)

    assert run("ptxas info : registers", 0).returncode == 0 and output.exists()
    assert run("nvcc error", 3).returncode == 3
    failed = run("ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized", 0)
    assert failed.returncode == 1 and not output.exists() and "another CUDA release" in failed.stderr
