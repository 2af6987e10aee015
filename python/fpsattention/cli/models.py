"""``fpsattn models``: the model families, from the table of adapters; ``--markdown`` writes ``docs/models.md``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any

import typer

from .output import JsonOption, print_json, print_table, stdout

_INTRODUCTION = """# Models

Written by `fpsattn models --markdown` from `fpsattention/integrations/adapters/`; do not edit.

`fps.apply(pipe_or_transformer, schedule)` takes every class of the first table, subclasses included, and `fps.apply(model,
adapter=Adapter(...))` others: a row of three to six lines, see `fpsattention/integrations/adapters/__init__.py`. Only the self-attention over
the grid is replaced, and where asked for the product of linear layers ("also": [diffusers.md](diffusers.md)). All of it is tested on tiny random models on the CPU (`tests/python/test_adapters.py`, `tests/python/test_pipelines.py`): moving a
cell of the input moves the predicted token, sparse attention is masked attention within the FP8 error, the noisiest step has the first phase,
and `remove()` restores every bit. That says where tokens are; it says nothing about the quality of videos.

"""
_NOTES = """
"Other tokens" of the same sequence (text, history, keyframes, references) are dense in both directions. A mask over padded text is
honoured: samples are attended without their padding, those of one length together, and rows of padding, which nothing reads, become 0. The
mask is compared with what the arguments of the forward say, once per layer and padding; another mask raises, or with
`on_unsupported="dense"` makes that layer dense and stands in the report. Compiled blocks of models with
such masks, and of Mochi, raise, or are dense and stand in the report. Text of a new length costs tables of its own, of which the last eight are kept.

## Refused

`fps.apply` raises `UnsupportedError` with the reason; `on_unsupported="dense"` leaves the model as it is and reports it.

"""


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Supported families and refused classes."""
    from ..integrations.adapters import ADAPTERS, REFUSED

    supported = [
        {
            "family": a.name,
            "kind": a.kind,
            "classes": list(a.classes),
            "noise_level": noise_level(a),
            "also": also(a),
            "note": a.note,
        }  # fmt: skip
        for a in ADAPTERS
    ]
    return supported, [{"class": name, "reason": reason} for name, reason in REFUSED.items()]


def noise_level(adapter: Any) -> str:
    """What the model is told, in words."""
    from ..integrations.adapters.adapter import inverted_sigma, own_sigma

    return {own_sigma: "sigma", inverted_sigma: "1000 (1 - sigma)"}.get(adapter.sigma, "1000 sigma")


def also(adapter: Any) -> str:
    """What can be had beside attention."""
    from ..integrations.adapters.adapter import raster_only

    have = {"FP8 linears": adapter.linears, "tile order": adapter.token_order is not raster_only}
    return ", ".join(what for what, there in have.items() if there)


def installed(name: str) -> bool:
    """Whether the installed diffusers has this class."""
    return importlib.util.find_spec("diffusers") is not None and hasattr(importlib.import_module("diffusers"), name)


def markdown() -> str:
    """The page."""
    supported, refused = rows()
    lines = ["| family | kind | class | told | also | notes |", "| --- | --- | --- | --- | --- | --- |"]
    for row in supported:
        classes = ", ".join(f"`{name}`" for name in row["classes"])
        lines.append(
            f"| {row['family']} | {row['kind']} | {classes} | {row['noise_level']} | {row['also']} | {row['note']} |"
        )
    reasons = ["| class | why |", "| --- | --- |"]
    reasons += [f"| `{row['class']}` | {row['reason']} |" for row in refused]
    return _INTRODUCTION + "\n".join(lines) + "\n" + _NOTES + "\n".join(reasons) + "\n"


def command(
    page: Annotated[bool, typer.Option("--markdown", help="Print the page docs/models.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the model families that a schedule can be applied to, and those that are refused, and why."""
    if page:
        typer.echo(markdown(), nl=False)
        return
    supported, refused = rows()
    for row in supported:
        row["status"] = "supported" if all(map(installed, row["classes"])) else "not in the installed diffusers"
    if as_json:
        print_json({"supported": supported, "refused": refused})
        return
    console = stdout()
    table = [(row["family"], row["kind"], row["classes"][0], row["status"], row["note"]) for row in supported]
    print_table(console, "model families", ("family", "kind", "class", "status", "notes"), table, fold="notes")
    reasons = [(row["class"], "refused", row["reason"]) for row in refused]
    print_table(console, "refused", ("class", "status", "why"), reasons, fold="why")
