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
the grid is replaced, and where asked for the product of linear layers and the norms before it ("also": [diffusers.md](diffusers.md)). All of it is tested on tiny random models on the CPU (`tests/python/test_adapters.py`, `tests/python/test_cosmos3.py`, `tests/python/test_pipelines.py`): moving a
cell of the input moves the predicted token, sparse attention is masked attention within the FP8 error, the noisiest step has the first phase,
and `remove()` restores every bit. That says where tokens are; it says nothing about the quality of videos.

"""
_NOTES = """
"Other tokens" of the same sequence (text, history, keyframes, references) are dense in both directions. Where a model masks padded text, the mask
that its attention gets decides, sample by sample and on the device: hidden keys are attended by nobody. Other masks raise, or with `on_unsupported="dense"` make that layer dense and stand in the report. Compiled blocks of
Mochi raise, or are dense and stand in the report.

## Outside of diffusers

| code | how | notes |
| --- | --- | --- |
{outside}| HunyuanVideo, Qwen-Image and others of musubi-tuner | `fps.apply(model, adapter=Adapter(..., core="attention"))` | a row of your own: see `tests/python/test_outside.py` |
| ComfyUI | the node FPSAttention | [comfyui.md](comfyui.md) |
| vLLM-Omni | `fpsattention.integrations.vllm_omni.register(...)` | an attention backend; contract-tested with stubs |
| SGLang diffusion | `fpsattention.integrations.sglang.register(...)` | an attention backend; contract-tested with stubs |
| xDiT, ParaAttention, cache-dit's parallelism | refused | their attention sees a part of the sequence |

In these code bases the forward of an attention module calls a core by name (`flash_attention`, `attention_forward`, `attention`), and
only that call is replaced, in the instances that the adapter names. Tested on tiny models with their call shapes, not in the code bases themselves
(`tests/python/test_outside.py`, `tests/python/test_servers.py`).

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

    have = {
        "FP8 linears": adapter.linears,
        "tile order": adapter.token_order is not raster_only,
        "prepare": not isinstance(adapter.prepare, str),
    }
    return ", ".join(what for what, there in have.items() if there)


def installed(name: str) -> bool:
    """Whether the installed diffusers has this class."""
    return importlib.util.find_spec("diffusers") is not None and hasattr(importlib.import_module("diffusers"), name)


def markdown() -> str:
    """The page."""
    from ..integrations.adapters import OUTSIDE

    supported, refused = rows()
    lines = ["| family | kind | class | told | also | notes |", "| --- | --- | --- | --- | --- | --- |"]
    for row in supported:
        classes = ", ".join(f"`{name}`" for name in row["classes"])
        lines.append(
            f"| {row['family']} | {row['kind']} | {classes} | {row['noise_level']} | {row['also']} | {row['note']} |"
        )
    reasons = ["| class | why |", "| --- | --- |"]
    reasons += [f"| `{row['class']}` | {row['reason']} |" for row in refused]
    outside = "".join(f"| {a.name} | `fps.apply(model, adapter=...)` | {a.note} |\n" for a in OUTSIDE)
    notes = _NOTES.replace("{outside}", outside)
    return _INTRODUCTION + "\n".join(lines) + "\n" + notes + "\n".join(reasons) + "\n"


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
