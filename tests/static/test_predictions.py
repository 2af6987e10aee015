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


def test_a_slower_loop_is_found():
    name = next(iter(DATA["kernels"]))
    data = copy.deepcopy(DATA)
    data["kernels"][name]["clocks"] = 1000
    assert predictions.slower(name, 1000 * (1 + data["margin"]) + 1, data) is not None
    assert predictions.slower(name, 1000 * (1 + data["margin"]) - 1, data) is None
