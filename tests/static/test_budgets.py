"""Compiled kernels stay within budgets.json: registers, spills, stack, opcodes, access widths. Needs no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import budgets

ENTRIES = json.loads((Path(__file__).parent / "budgets.json").read_text())
KEYS = {"name", "kernel", "instances", "max_registers", "max_stack", "max_spills", "max_loop_spills"}
KEYS |= {"opcodes", "forbid_opcodes", "sass", "forbid_sass"}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_within_budget(entry, kernels):
    assert budgets.violations(entry, kernels) == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_entry_has_only_known_keys(entry):
    assert {"name", "kernel"} <= set(entry) <= KEYS and len(entry) > 2


FAKE = {
    "name": "f<1>(int)",
    "registers": 40,
    "stack": 8,
    "spill_loads": 1,
    "spill_stores": 2,
    "loops": [{"role": "mma", "spills": 2}, {"role": "math", "spills": 5}],
    "opcodes": {"QGMMA": 4},
    "text": "LDG.E.64 R0, [R2] ;",
}
GOOD = {
    "max_registers": 40,
    "max_stack": 8,
    "max_spills": 3,
    "max_loop_spills": 2,
    "opcodes": ["QGMMA"],
    "sass": [r"LDG\.E\.64"],
}
BAD = [
    ({"kernel": "g<"}, "0 kernels"),
    ({"instances": 2}, "1 kernels"),
    ({"max_registers": 39}, "registers 40 > 39"),
    ({"max_stack": 0}, "stack 8 > 0"),
    ({"max_spills": 2}, "spills 3 > 2"),
    ({"max_loop_spills": 1}, "loop_spills 2 > 1"),
    ({"opcodes": ["UTMALDG"]}, "no UTMALDG"),
    ({"forbid_opcodes": ["QGMMA"]}, "has QGMMA"),
    ({"sass": [r"LDG\.E\.128"]}, r"no LDG\.E\.128"),
    ({"forbid_sass": [r"LDG\.E\.64"]}, r"has LDG\.E\.64"),
]


def test_a_kernel_within_its_budget_passes():
    assert budgets.violations({"name": "f", "kernel": "f<", **GOOD}, [FAKE]) == []


@pytest.mark.parametrize("change, text", BAD, ids=[text for _, text in BAD])
def test_a_broken_budget_is_reported(change, text):
    problems = budgets.violations({"name": "f", "kernel": "f<", **GOOD, **change}, [FAKE])
    assert len(problems) == 1 and text in problems[0]
