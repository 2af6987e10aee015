"""The forward's main loop, read from the SASS: what it costs per thread and KV block, and that its WGMMAs overlap. Needs no GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest

PROMOTE_BLOCKS = 2  # Config::kPromoteBlocks

# Instructions per thread and KV block, a block's share of the promotion included: (all, those that are not P's), what was reached plus
# 1 or 2 %. With P from exponentials alone (64 EX2 and 32 packs) the loops had 299, 377, 271 and 351, of them 203, 281, 175 and 255 not P's.
# That total was given up for fewer clocks: codes by arithmetic cost more instructions, of units that have time. What is not P's is held
# near what it was: 13 to 19 more are the line and the constants of the codes, whose opcodes others have too, and the release of slots in
# the other CTA of a cluster.
LIMITS = {
    "Config<128, false>": (354, 219), "Config<128, true>": (435, 303),
    "Config<64, false>": (331, 192), "Config<64, true>": (412, 271),
}  # fmt: skip

# What makes P of exponents: EX2, packs, and the integer and half-precision arithmetic of codes. A handful of others (addresses, parities)
# have such opcodes, too.
P_OPCODES = re.compile(
    r"(?:@!?U?P\d+ )?(?:MUFU\.EX2|F2FP|HFMA2|HMNMX2|VHMNMX|PRMT|LOP3|LEA|SHF|IADD3|VIADD|IMAD(?!\.(?:MOV|U32)))\b"
)

# What only some blocks execute stands behind a forward branch. Told apart by an opcode that no other such region has.
REGIONS = {
    "raise": r"FRND",  # a row maximum moved: exact maximum, new integer
    "rescale": r"F2I",  # then: O times a power of two
    "await": r"SYNCS\.PHASECHK",  # the next K block and its scale: every block but the last one of a list
    "promote": r"FADD",  # every PROMOTE_BLOCKS blocks
}


def loop_instructions(sass: str, header: int, latch: int) -> list[tuple[int, str]]:
    """(address, text) of a loop."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", sass, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found if header <= int(address, 16) <= latch]


def split(instructions: list[tuple[int, str]]) -> dict[str, int]:
    """How many instructions every block executes ("always"), of them those that make P ("p"), and how many stand in each of REGIONS."""
    counts = {"always": 0, "p": 0, **dict.fromkeys(REGIONS, 0)}
    last = instructions[-1][0]
    at = 0
    while at < len(instructions):
        address, text = instructions[at]
        counts["always"] += 1
        counts["p"] += bool(P_OPCODES.match(text))
        at += 1
        branch = re.match(r"@!?U?P\d+ BRA 0x([0-9a-f]+)", text)
        if not branch or not address < int(branch[1], 16) <= last:
            continue  # not a branch; or to a spin loop behind the kernel; or back to the header
        region = [text for other, text in instructions if address < other < int(branch[1], 16)]
        kinds = [name for name, opcode in REGIONS.items() if any(re.search(opcode, text) for text in region)]
        if "rescale" in kinds or "raise" in kinds:  # both add and multiply, too
            kinds = [name for name in kinds if name in ("rescale", "raise")]
        if len(kinds) != 1 or counts[kinds[0]]:
            raise ValueError(f"conditional code at {address:#x} is {kinds or 'unknown'}: update REGIONS")
        counts[kinds[0]] = len(region)
        at += len(region)
    return counts


def steady_instructions(counts: dict[str, int]) -> float:
    """Per thread and KV block in the middle of a long list, no maximum moving: the promotion spread over its blocks."""
    return counts["always"] + counts["await"] + counts["promote"] / PROMOTE_BLOCKS


def problems(loop: dict[str, Any], steady: float, of_p: int, limits: tuple[int, int]) -> list[str]:
    """What is wrong with a main loop, as sassbudget reports it. ``of_p`` of its ``steady`` instructions make P."""
    found = []
    if loop["mix"]["mufu"] > 64:
        found.append(f"{loop['mix']['mufu']} exponentials > 64")
    if steady > limits[0]:
        found.append(f"{steady} instructions > {limits[0]}")
    if steady - of_p > limits[1]:
        found.append(f"{steady - of_p} instructions that do not make P > {limits[1]}")
    if loop["spills"]:
        found.append(f"{loop['spills']} spills")
    # Two WARPGROUP.ARRIVE and three DEPBAR: QK, and two halves of PV. Serialized WGMMAs (ptxas C7510 to C7520) have a pair each: 16.
    if loop["mix"]["wgsync"] != 5:
        found.append(f"{loop['mix']['wgsync']} warpgroup synchronizations, expected 5: are the WGMMAs serialized?")
    return found


@pytest.mark.parametrize("config", LIMITS)
def test_main_loop(config, kernels):
    (kernel,) = [kernel for kernel in kernels if "forward_kernel<" in kernel["name"] and config in kernel["name"]]
    (loop,) = [loop for loop in kernel["loops"] if loop["role"] == "mma"]
    counts = split(loop_instructions(kernel["text"], loop["header"], loop["latch"]))
    assert counts["always"] == loop["instructions"]  # sassbudget's reading of the same loop
    assert all(counts.values()), counts
    steady = steady_instructions(counts)
    print(config, counts, steady)
    assert problems(loop, steady, counts["p"], LIMITS[config]) == []
    if config == "Config<128, false>":
        # Codes by arithmetic take more instructions than exponentials, and none of their unit: issue has room for them.
        assert loop["warpgroups"] * steady <= 0.7 * loop["cycles"]["tensor"]


def test_split_counts_regions():
    lines = [
        "MUFU.EX2 R1, R1",
        "@!P0 BRA 0x40",
        "FRND.CEIL R2, R2",
        "FADD R2, R2, 1",
        "@P1 BRA 0x60",
        "SYNCS.PHASECHK R3",
        "@P2 BRA 0x0",
    ]
    instructions = [(16 * i, line) for i, line in enumerate(lines)]
    assert split(instructions) == {"always": 4, "p": 1, "raise": 2, "rescale": 0, "await": 1, "promote": 0}
    with pytest.raises(ValueError, match="unknown"):
        split([(0, "@P0 BRA 0x20"), (16, "FMUL R1, R1, R1"), (32, "@P1 BRA 0x0")])


GOOD = {"mix": {"mufu": 64, "wgsync": 5}, "spills": 0}


@pytest.mark.parametrize(
    "change, steady, of_p",
    [
        ({"mix": {"mufu": 65, "wgsync": 5}}, 300, 100),
        ({"mix": {"mufu": 64, "wgsync": 16}}, 300, 100),
        ({}, 300.5, 101),
        ({}, 300, 99),
        ({"spills": 1}, 300, 100),
    ],
)
def test_planted_failures_are_found(change, steady, of_p):
    assert problems(GOOD, 300, 100, (300, 200)) == []
    assert len(problems({**GOOD, **change}, steady, of_p, (300, 200))) == 1


def test_opcodes_of_p():
    made = ["MUFU.EX2 R1, R1", "@P0 F2FP.F16.F32.PACK_AB R1, R2, R3", "HFMA2.SAT R1, R2, R3, R4", "PRMT R1, R2, 0x7531, R3", "IMAD R1, R2, 0x20, R3"]  # fmt: skip
    others = ["IMAD.MOV.U32 R1, RZ, RZ, R2", "FFMA R1, R2, R3, R4", "UIMAD.WIDE.U32 UR8, UR4, 0x400, UR16", "PLOP3.LUT P2, PT, PT, PT, UP0, 0x80, 0x0", "MUFU.RCP R1, R1"]  # fmt: skip
    assert [bool(P_OPCODES.match(text)) for text in made + others] == [True] * len(made) + [False] * len(others)
