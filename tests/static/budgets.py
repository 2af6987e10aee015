"""Reads compiled kernels (sassbudget, cuobjdump) and checks them against the entries of ``budgets.json``.

Keys of an entry, all but the first two optional: ``name``; ``kernel``, a regex searched in the demangled name; ``instances``, how
many kernels must match (default: at least one); ``max_registers``, ``max_stack`` (bytes), ``max_spills`` (local loads and stores of
the whole kernel), ``max_loop_spills`` (of any loop that issues MMAs); ``opcodes`` and ``forbid_opcodes``, base opcodes such as
``QGMMA``; ``sass`` and ``forbid_sass``, regexes over the SASS text, such as ``LDG\\.E\\.128``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from sassbudget.binary import load
from sassbudget.budget import analyse
from sassbudget.cli import parser
from sassbudget.model import RATES
from sassbudget.sass import Function


class Unavailable(Exception):
    """Why compiled kernels cannot be looked at here."""


def find_cuobjdump() -> str:
    """cuobjdump: PATH, CUDA_HOME, or the nvidia-cuda-cuobjdump wheel."""
    folders = [
        *Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"),
        Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin",
    ]
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if not found:
        raise Unavailable("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def find_binary() -> Path:
    """libfpsattn.so below FPSATTN_BUILD_DIR."""
    folder = os.environ.get("FPSATTN_BUILD_DIR")
    if not folder:
        raise Unavailable("FPSATTN_BUILD_DIR is not set: the folder that holds libfpsattn.so")
    found = sorted(Path(folder).rglob("libfpsattn.so"))
    if not found:
        raise Unavailable(f"no libfpsattn.so below FPSATTN_BUILD_DIR={folder}: built without nvcc?")
    return found[0]


def read_kernels() -> list[dict[str, Any]]:
    """sassbudget's facts of every kernel in the library, each with its SASS under "text"."""
    binary, cuobjdump = find_binary(), find_cuobjdump()
    elfs = subprocess.run([cuobjdump, "-lelf", str(binary)], capture_output=True, text=True).stdout
    if "sm_90a" not in elfs:
        raise Unavailable(f"{binary} holds no sm_90a code (FPSATTN_PTX_ONLY=ON?)")
    os.environ.setdefault("SASSBUDGET_TOOLS", str(Path(cuobjdump).parent))
    options = parser().parse_args([str(binary), "--no-live"])
    options.rates = dict(RATES)
    return [{**analyse(kernel, options)[0], "text": text(kernel)} for kernel in load(str(binary), options)]


def text(kernel: Function) -> str:
    """The instructions, a line each as cuobjdump writes them: address, predicate, opcode, arguments with addresses for labels."""

    def address(label: re.Match[str]) -> str:
        return hex(kernel.labels[label[1]]) if label[1] in kernel.labels else label[0]

    lines = (
        f"/*{i.addr:04x}*/ {i.pred} {i.op} {re.sub(r'`[(]([^)]+)[)]', address, i.args)}".rstrip() + " ;"
        for i in kernel.instrs
    )
    return "\n".join(re.sub(r"  +", " ", line) for line in lines)


def violations(entry: dict[str, Any], kernels: list[dict[str, Any]]) -> list[str]:
    """What the kernels that ``entry`` names do wrong, a line each."""
    matching = [kernel for kernel in kernels if re.search(entry["kernel"], kernel["name"])]
    problems = []
    if not matching or len(matching) != entry.get("instances", len(matching)):
        problems.append(
            f"{len(matching)} kernels match {entry['kernel']!r}, expected {entry.get('instances', 'at least 1')}"
        )
    for kernel in matching:
        facts = {
            "max_registers": kernel["registers"],
            "max_stack": kernel["stack"],
            "max_spills": kernel["spill_loads"] + kernel["spill_stores"],
            "max_loop_spills": max((loop["spills"] for loop in kernel["loops"] if loop["role"] == "mma"), default=0),
        }
        found = [
            f"{key[4:]} {value} > {entry[key]}" for key, value in facts.items() if key in entry and value > entry[key]
        ]
        found += [f"no {op}" for op in entry.get("opcodes", []) if op not in kernel["opcodes"]]
        found += [f"has {op}" for op in entry.get("forbid_opcodes", []) if op in kernel["opcodes"]]
        found += [f"no {pattern}" for pattern in entry.get("sass", []) if not re.search(pattern, kernel["text"])]
        found += [f"has {pattern}" for pattern in entry.get("forbid_sass", []) if re.search(pattern, kernel["text"])]
        problems += [f"{kernel['name']}: {problem}" for problem in found]
    return problems
