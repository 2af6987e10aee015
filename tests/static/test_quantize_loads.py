"""Every thread of the quantize kernels has all loads of a patch in flight before it uses the first one. Read from the SASS, no GPU.

Memory is what bounds these kernels: 16 bytes x loads in flight x threads of an SM must cover its latency (docs/kernels/quantize.md).
"""

from __future__ import annotations

import re

import pytest

# Loads per patch (kPatchSlots) and of the statistics (kUnroll). Roles of the main kernel: V with a given and a computed scale,
# K and Q; the two that share a scale by tile load in front of a loop, in it, and again when they walk back. In prepare K and Q share their code. Statistics: K and V,
# each in full steps and a last one.
EXPECTED = {
    r"quantize_kernel<.*GroupScope\)0>": (16, 8),
    r"quantize_kernel<.*GroupScope\)1>": (16, 4),
    r"prepare_kernel<.*GroupScope\)0>": (16, 5),
    r"prepare_kernel<.*GroupScope\)1>": (16, 3),
    r"prepared_mean_kernel<": (4, 1),
    r"statistics_kernel<": (8, 4),
}


def groups_in_flight(sass: str) -> list[int]:
    """Sizes of the groups of 16-byte row loads (LDG.E.NA.128) that are issued before one of them is used or a branch is taken."""
    groups, registers, count = [], set(), 0
    for text in re.findall(r"^\s*/\*[0-9a-f]{4,6}\*/\s+(.*?)\s*;", sass, re.MULTILINE):
        text = re.sub(r"^@!?U?P\w+\s+", "", text)
        load = re.match(r"LDG\.E\.NA\.128 R(\d+), (.*)", text)
        used = {int(r) for r in re.findall(r"\bR(\d+)", load[2] if load else text)}
        if count and (used & registers or text.startswith(("BRA", "EXIT"))):
            groups.append(count)
            registers, count = set(), 0
        if load:
            registers |= set(range(int(load[1]), int(load[1]) + 4))
            count += 1
    return groups + [count] * bool(count)


@pytest.mark.parametrize("pattern", EXPECTED)
def test_all_loads_of_a_patch_are_in_flight(pattern, kernels):
    matching = [kernel for kernel in kernels if re.search(pattern, kernel["name"])]
    assert matching  # how many: budgets.json
    loads, groups = EXPECTED[pattern]
    for kernel in matching:
        assert groups_in_flight(kernel["text"]) == [loads] * groups, kernel["name"]


def sass(*lines: str) -> str:
    return "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */" for i, line in enumerate(lines))


def test_a_use_between_loads_is_found():
    load = "LDG.E.NA.128 R{}, desc[UR8][R{}.64]".format
    together = [load(20, 2), "IADD3 R4, R4, R5, RZ", load(24, 4), load(28, 28), "FADD R1, R29, R30", "FADD R1, R21, R1"]
    assert groups_in_flight(sass(*together)) == [3]
    assert groups_in_flight(sass(load(20, 2), load(24, 4), "@P0 FADD R1, R23, R1", load(28, 6), "EXIT")) == [2, 1]
    assert groups_in_flight(sass(load(20, 2), "@P1 BRA 0x70", load(24, 4))) == [1, 1]
    assert groups_in_flight(sass("LDG.E.128.CONSTANT R4, desc[UR8][R2.64]", "FADD R1, R4, R5")) == []
