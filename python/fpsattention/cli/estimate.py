"""``fpsattn estimate``: where the time of a denoising step goes, and what sparse FP8 attention and FP8 linears can make of it."""

from __future__ import annotations

import textwrap
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import JsonOption, print_json, working
from .plan import parse_sizes

if TYPE_CHECKING:
    from ..estimate import Estimate

WIDTH = 80


def command(
    model: Annotated[str, typer.Option(help="wan-14b, wan-1.3b or hunyuanvideo.")] = "wan-14b",
    grid: Annotated[str, typer.Option(help="Token grid T x H x W, e.g. 21x45x80 (Wan 720p, 81 frames).")] = "21x45x80",
    gpu: Annotated[str, typer.Option(help="h200, h100 or h20.")] = "h200",
    baseline: Annotated[str, typer.Option(help="Dense BF16 attention before: cudnn, fa3 or fa2.")] = "cudnn",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a video.")] = 50,
    forwards: Annotated[int, typer.Option(min=1, help="Forwards per step: 2 with classifier-free guidance.")] = 2,
    prepare: Annotated[
        bool, typer.Option(help="Norms and RoPE of q and k run in the quantizer (apply(prepare=True)).")
    ] = True,
    kernels: Annotated[
        bool, typer.Option(help="One block before and after, as lists of kernels, in Markdown.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate a denoising step and a video, part by part, from FLOPs, bytes and rates. Nothing is run."""
    from ..estimate import estimate
    from ..estimate.forward import DENSITIES, PAPER_BASELINE, PAPER_GPU, three_lines

    sizes = parse_sizes(grid, "estimate: grid")
    with working(f"estimating {grid}", quiet=as_json):
        of = partial(estimate, model, sizes, steps=steps, forwards=forwards, prepare=prepare)
        asked = [of(gpu, baseline, density) for density in DENSITIES]
        paper = [of(PAPER_GPU, PAPER_BASELINE, density) for density in DENSITIES]
    if kernels:
        from ..estimate.document import block_tables

        typer.echo(block_tables(asked[1]))
        return
    lines = three_lines(asked, paper)
    if as_json:
        print_json(_as_json(asked, paper, lines))
        return
    for line in text(asked, paper, lines):
        typer.echo(line)


def text(asked: list[Estimate], paper: list[Estimate], lines: list[tuple[str, list[float], float]]) -> list[str]:
    """Everything, in lines of at most 80 characters."""
    from ..estimate import BASELINES, render
    from ..estimate.forward import PAPER_SPEEDUP

    one = asked[1]
    tokens = one.grid[0] * one.grid[1] * one.grid[2]
    out = [
        f"{one.model.name}, grid {'x'.join(map(str, one.grid))} ({tokens:,} tokens), {one.model.num_layers} blocks, one {one.gpu.title}",
        f"one forward, batch 1; baseline {BASELINES[one.baseline]}, dense BF16; density {one.asked:g} ({one.density:.3f})",
        "norms and RoPE of q and k: " + ("in the quantizer" if one.prepare else "kernels of their own"),
        "",
        *render(one.columns),
        "",
        f"{'s per video':<16}" + "".join(f"{name:>21}" for name in one.video),
    ]
    for part in next(iter(one.video.values())):
        out.append(f"{part:<16}" + "".join(f"{times[part]:>21.2f}" for times in one.video.values()))
    out += [
        "",
        f"{'speed-up of a forward, predicted; density':<42}"
        + "".join(f"{e.asked:>8g}" for e in asked)
        + f"{'limit':>10}",
    ]
    for what, speedups, limit in lines:
        out.append(f"{what:<42}" + "".join(f"{f'{s:.2f}x':>8}" for s in speedups) + f"{f'{limit:.2f}x':>10}")
    out += wrapped(
        f"The paper reports {PAPER_SPEEDUP}x on an H20 at 720p, with FP8 attention and feed-forward; its baseline is not named. "
        "Limit: self-attention free, everything else as it is."
    )
    out += ["", "rates"]
    of_paper = {f"{name}, {paper[0].gpu.title}": rate for name, rate in paper[0].sources.items()}
    for name, rate in {**one.sources, **of_paper}.items():
        value = f"{rate.value / 1e12:.{0 if rate.value > 1e13 else 2}f} {'TB/s' if name.startswith('memory') else 'TFLOP/s'}"
        out += wrapped(f"{name}: {value}, {rate.kind}: {rate.source}", indent="  ")
    out += wrapped(
        "VAE: FLOPs of the decoder at a fifth of the rate of BF16 products; text: FLOPs or weights of the encoder; predicted. "
        "Floor: FLOPs and bytes at the datasheet's peaks. No power limit, no launch gaps. No time here was measured."
    )
    return out


def wrapped(sentence: str, indent: str = "") -> list[str]:
    return textwrap.wrap(sentence, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _as_json(
    asked: list[Estimate], paper: list[Estimate], lines: list[tuple[str, list[float], float]]
) -> dict[str, Any]:
    one = asked[1]

    def of(e: Estimate) -> dict[str, Any]:
        return {
            "density_asked": e.asked,
            "density": e.density,
            "parts_ms": {
                name: {part: {"ms": t.ms, "floor_ms": t.floor, "kind": t.kind} for part, t in column.items()}
                for name, column in e.columns.items()
            },
            "video_s": e.video,
            "speedup": {name: e.speedup(name) for name in e.columns},
            "limit": {name: e.limit(name) for name in e.columns},
        }

    def rates(e: Estimate) -> dict[str, Any]:
        return {name: {"per_second": r.value, "kind": r.kind, "source": r.source} for name, r in e.sources.items()}

    return {
        "model": one.model.name, "grid": list(one.grid), "gpu": one.gpu.name, "baseline": one.baseline, "kind": "predicted",
        "prepare": one.prepare,
        "estimates": [of(e) for e in asked], "rates": rates(one),
        "paper": {"gpu": paper[0].gpu.name, "baseline": paper[0].baseline, "estimates": [of(e) for e in paper], "rates": rates(paper[0])},
        "lines": [{"what": what, "speedups": speedups, "limit": limit} for what, speedups, limit in lines],
    }  # fmt: skip
