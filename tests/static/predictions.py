"""Predicted clocks of the kernels' main loops (tools/sasstime): against predictions.json, and as the table of docs/speed_model.md.

    python tests/static/predictions.py FOLDER           # what is predicted for the libfpsattn.so below FOLDER, beside what is recorded
    python tests/static/predictions.py FOLDER --write   # records it: predictions.json and the table

Run the second after a change that is meant to change the loops, with nvcc of the release that cmake/cuda_wheels.py names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tools")]
import budgets  # noqa: E402

from sasstime import item, machine, sass  # noqa: E402
from sasstime.predict import predict, read_description  # noqa: E402

DATA = ROOT / "python/fpsattention/estimate/predictions.json"  # the package reads it, too
DOCUMENT = ROOT / "docs/speed_model.md"
BEGIN, END = "<!-- predictions: python tests/static/predictions.py FOLDER --write -->", "<!-- end of predictions -->"


def read_data() -> dict[str, Any]:
    return json.loads(DATA.read_text())


def predict_all(names: list[str]) -> dict[str, dict[str, Any]]:
    """sasstime's prediction by description; budgets.Unavailable where there is no machine code to look at."""
    binary = budgets.find_binary()
    os.environ.setdefault("SASSBUDGET_TOOLS", str(Path(budgets.find_cuobjdump()).parent))
    functions = sass.load(str(binary), r"forward_kernel|dkdv_kernel|dq_kernel")
    if not functions:
        raise budgets.Unavailable(f"{binary} holds no sm_90a code (FPSATTN_PTX_ONLY=ON?)")
    found = {}
    for name in names:
        description = read_description(name)
        matching = [function for function in functions if sass.matches(function, description["kernel"])]
        if len(matching) != 1:
            raise ValueError(f"{name}: {len(matching)} kernels match {description['kernel']!r}, expected 1")
        model, out, _ = predict(matching[0], description, dict(machine.DEFAULTS))
        found[name] = {**out, "assumed": model.path.assumed}
        if "item" in description:
            found[name]["item_clocks"], found[name]["block_clocks"] = item.linear(
                matching[0], description, dict(machine.DEFAULTS)
            )
    return found


def slower(name: str, clocks: float, data: dict[str, Any]) -> str | None:
    """What is wrong with a prediction, or None: it may exceed the recorded one by the model's median calibration error."""
    recorded = data["kernels"][name]["clocks"]
    limit = recorded * (1 + data["margin"])
    if clocks <= limit:
        return None
    return f"{name}: {clocks:.0f} clocks predicted, {recorded} recorded, {limit:.0f} allowed"


def table(data: dict[str, Any]) -> str:
    """The table of docs/speed_model.md, of what predictions.json records."""
    lines = [
        "| kernel | one iteration | predicted clocks | tensor cores busy | predicted TFLOP/s | clocks of an item beyond | calibration error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in data["kernels"].values():
        lines.append(
            f"| {entry['title']} | {entry['iteration']} | {entry['clocks']} | {entry['tensor_percent']} % | {entry['tflops']} "
            f"| {entry.get('item_clocks', '')} | {data['calibration']} |"
        )
    return "\n".join(lines)


def replace_table(document: str, data: dict[str, Any]) -> str:
    head, rest = document.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{table(data)}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="libfpsattn.so is looked for below it")
    parser.add_argument("--write", action="store_true", help="record the predictions")
    args = parser.parse_args()
    os.environ["FPSATTN_BUILD_DIR"] = args.folder
    data = read_data()
    for name, found in predict_all(list(data["kernels"])).items():
        entry = data["kernels"][name]
        print(
            f"{name:40} {found['clocks']:6.0f} clocks (recorded {entry['clocks']}), {found['tflops_loop']:5.0f} TFLOP/s"
        )
        entry["clocks"], entry["tflops"] = round(found["clocks"]), round(found["tflops_loop"])
        entry["tensor_percent"] = round(100 * found["tensor_utilization"])
        if "item_clocks" in found:
            entry["item_clocks"] = round(found["item_clocks"])
    if args.write:
        DATA.write_text(json.dumps(data, indent=2) + "\n")
        DOCUMENT.write_text(replace_table(DOCUMENT.read_text(), data))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (budgets.Unavailable, sass.Mismatch, ValueError) as error:
        sys.exit(f"predictions: {error}")
