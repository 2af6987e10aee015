"""Predicted clocks of every main loop stay within predictions.json (tools/sasstime). Needs no GPU, and says nothing of one."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import predictions

DATA = predictions.read_data()


@pytest.mark.parametrize("name", DATA["kernels"])
def test_loop_is_not_predicted_to_be_slower(name, found):
    assert predictions.slower(name, found[name]["clocks"], DATA) is None


def test_every_main_loop_is_predicted_or_says_why_not(kernels):
    described = [predictions.read_description(name)["kernel"] for name in DATA["kernels"]]
    left_out = [
        kernel["name"] for kernel in kernels
        if any(loop["role"] == "mma" for loop in kernel["loops"])
        and not any(re.search(pattern, kernel["name"]) for pattern in [*described, *DATA["not_predicted"]])
    ]  # fmt: skip
    assert left_out == []


def test_the_document_holds_the_recorded_table():
    document = predictions.DOCUMENT.read_text()
    assert predictions.replace_table(document, DATA) == document, "run tests/static/predictions.py FOLDER --write"
    assert "predicted, not measured" in document.lower()


@pytest.mark.parametrize("density, least", [(0.194, 0.95), (0.1, 0.93)])
def test_short_lists_keep_the_rate_of_dense_ones(density, least, found):
    """Wan2.1-14B at 720p, all 40 heads on 132 SMs: prologues, epilogues, unequal lists and the last wave included."""
    pytest.importorskip("torch")
    sys.path.insert(0, str(predictions.ROOT))
    from benchmarks import work_order, workloads

    kernel, shape = found["fpsattn_forward_d128_clusters"], workloads.WAN_14B_720P
    rate = {
        d: work_order.efficiency(
            work_order.work_order(workloads.build(shape, d, "cpu").mask),
            shape.heads, kernel["item_clocks"], kernel["block_clocks"],
        )
        for d in (1.0, density)
    }  # fmt: skip
    print(density, kernel["item_clocks"], kernel["block_clocks"], rate)
    assert rate[density] >= least * rate[1.0]


def test_a_slower_loop_is_found():
    name = next(iter(DATA["kernels"]))
    data = copy.deepcopy(DATA)
    data["kernels"][name]["clocks"] = 1000
    assert predictions.slower(name, 1000 * (1 + data["margin"]) + 1, data) is not None
    assert predictions.slower(name, 1000 * (1 + data["margin"]) - 1, data) is None
