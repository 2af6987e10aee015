"""The methods that ``fpsattn compare`` runs, behind one interface: attention of one layer at one sigma.

The baselines' numerics are models of accuracy (:mod:`.numerics`); their sparsity is the published rule (:mod:`fpsattention.patterns`). FPSAttention is the
library's own op. A method is what its paper runs, with the paper's defaults where it has some; its densities are its own, and are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from .. import patterns
from ..analysis.captures import level_mask
from ..errors import ConfigError
from ..integrations.tokens import resolve_window
from ..layout.masks import BlockMask, dense_mask, sliding_tile_mask
from ..layout.tiles import TileLayout
from ..ops.attend import attend
from ..schedule import Level, Phase, Schedule, Window
from ..schedule.level import Granularity, window_to_json
from . import packages
from .numerics import BF16, EXACT, NAIVE_FP8, PAPER, SAGE, Numerics, blockwise_attention


class Context(NamedTuple):
    """What an attention call knows beside its tensors. ``trajectory``: the sigmas that the run visits, where they are known; ``exact``: frames that
    FPSAttention keeps dense in both directions."""

    layout: TileLayout
    layer: int
    sigma: float
    scale: float | None
    trajectory: tuple[float, ...] | None = None
    exact: tuple[int, ...] = ()


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: on the command line. label: in tables.
        numerics: of the emulation; None: the library's op, at its :meth:`level`.
        pattern: which blocks are visited. window: a sliding tile window instead. Neither: all.
        schedule: precisions, windows and scale groups by sigma, of FPSAttention.
        bits: "bf16", "int8+fp8" or "fp8": what tensor cores would run.
        options: of the emulation.
        compensate: skipped tiles have pseudo-keys.
    """

    name: str
    label: str
    source: str
    numerics: Numerics | None = EXACT
    pattern: patterns.BoundPattern | None = None
    window: Window = None
    schedule: Schedule | None = None
    bits: str = "bf16"
    options: Mapping[str, Any] = field(default_factory=dict)
    compensate: bool = False

    def level(self, context: Context) -> Level:
        """Of the schedule, as ``fps.apply`` would have it; where there is none, FP8 with scales per tile."""
        if self.schedule is None:
            return Level("all")
        edges = self.schedule.edges if context.trajectory is None else self.schedule.edges_of(context.trajectory)
        return self.schedule.segment_levels(context.layer)[self.schedule.segment(context.sigma, edges)]

    def is_dense(self, context: Context) -> bool:
        """The model's own attention, to the bit."""
        if self.schedule is not None:
            return self.level(context).precision == "bf16"
        return self.name == "dense"

    def mask(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> BlockMask:
        """The blocks visited; q, k, v ``(B, H, S, D)``."""
        layout = context.layout.to(q.device)
        if self.schedule is not None and not self.is_dense(context):
            level = self.level(context)
            schedule = self.schedule if self.schedule.tile is not None else replace(self.schedule, tile=layout.tile)
            text = (layout.text_len, layout.text_position if layout.text_len else "suffix")
            tensors = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            mask: BlockMask = level_mask(
                schedule, level, layout.grid, q.shape[1], context.layer, *text, tensors=tensors, exact=context.exact
            )
            return mask.to(q.device)
        if self.pattern is not None:
            return self.pattern(q, k, layout, v=v)
        if self.window is not None:
            return sliding_tile_mask(layout, resolve_window(self.window, layout))
        return dense_mask(layout)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, context: Context) -> Tensor:
        """The output under ``mask``, ``(B, H, S, D)``."""
        package, _ = self.implementation(q, mask)
        if package is not None:
            options = dict(self.options)
            if self.window is not None:
                options["window"] = resolve_window(self.window, context.layout)
            return packages.run(package, q, k, v, mask, context, options)
        if self.numerics is not None:
            return blockwise_attention(q, k, v, mask, self.numerics, scale=context.scale, **self.options)[0]
        level = self.level(context)
        if self.compensate:
            if level.precision != "fp8" or level.hadamard or not isinstance(level.granularity, str):
                what = ", ".join([level.precision, f"{level.scales} scales", *(["rotated"] if level.hadamard else [])])
                raise ConfigError(
                    f"fpsattention.compare: {self.name} with level {level.name!r} ({what}), expected fp8, scales per tile, block or token, not "
                    "rotated: pseudo-keys are joined to that op"
                )
            return patterns.compensated_attention(q, k, v, mask, granularity=level.granularity, scale=context.scale)[0]
        return attend(
            q, k, v, mask, granularity=level.granularity, precision=level.precision, hadamard=level.hadamard,
            smooth_k=level.precision != "paper", scale=context.scale, tensor_layout="HND",
        )[0]  # fmt: skip

    def implementation(self, q: Tensor, mask: BlockMask) -> tuple[packages.Package | None, str]:
        """The project's own package where it can run, or None; and what runs, in words."""
        if self.numerics is None:
            return None, "this library"
        return packages.implementation(self.name, q, mask, self.window)

    def selected_density(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> float:
        """What the rule selects; the mask attends a little more where selector and kernel speak of different blocks."""
        pattern = self.pattern
        if (
            self.schedule is not None
            and not self.is_dense(context)
            and (named := self.level(context).pattern) is not None
        ):
            pattern = named.of_layer(context.layer)
        if pattern is None:
            return self.mask(q, k, v, context).density
        given = {"q": q, "k": k, "v": v}
        wanted = {name: given[name] for name in pattern.pattern.inputs}
        return pattern.pattern.density(layout=context.layout, **wanted, **pattern.hyperparameters).selected

    def describe(self) -> dict[str, Any]:
        """What decides its results, for a run's key and the report."""
        return {
            "name": self.name,
            "numerics": "this library" if self.numerics is None else asdict(self.numerics),
            "pattern": None if self.pattern is None else self.pattern.to_dict(),
            "window": None if self.window is None else window_to_json(self.window),
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "options": dict(self.options),
            "compensate": self.compensate,
            "package": packages.installed(self.name),
        }


def _method(*args: Any, **kwargs: Any) -> tuple[str, Method]:
    method = Method(*args, **kwargs)
    return method.name, method


def methods(schedule: Schedule, density: float = 0.2, granularity: Granularity = "tile") -> dict[str, Method]:
    """All methods by name, in the order of the paper's Table 2.

    Args:
        schedule: FPSAttention's.
        density: of STA's window.
        granularity: of FPSAttention's scales where nothing is skipped: "tile", or a size in tokens, multiples of the schedule's tile.
    """
    name = schedule.provenance.get("preset", "given")
    shared = dict.fromkeys(level.scales for level in schedule.levels.values() if level.precision != "bf16")
    scales = f"{', '.join(shared)} scales" if shared else "all dense"
    try:
        every = Level("all", granularity=granularity)
        rounded = Schedule({"all": every}, (Phase(1.0, 0.0, "all"),), tile=schedule.tile)
    except ConfigError as error:
        raise ConfigError(f"fpsattention.compare: granularity: {error}") from None
    paper = replace(PAPER, q_group=granularity, k_group=granularity)
    return dict(
        [
            _method("dense", "dense", "the model's own attention"),
            _method("bf16", "BF16", "both products of BF16 operands, sums in FP32", BF16),
            _method("sage", "SageAttention", "INT8 QK per block, K smoothed, FP8 PV", SAGE, bits="int8+fp8"),
            _method(
                "sparge", "SpargeAttn", "self-similarity gate and CDF 0.98, then the filter in the softmax (50); Sage numerics", SAGE,
                patterns.get("sparge"), bits="int8+fp8", options={"pv_threshold": 50.0},
            ),
            _method("svg", "SparseVideoGen", "spatial or temporal band per head, share 0.25", EXACT, patterns.get("svg")),
            _method("sta", "STA", f"sliding tile window of density {density}", EXACT, window=density),
            _method("naive", "naive FP8", "one scale per head", NAIVE_FP8, bits="fp8"),
            _method("fps-fp8", "FPSAttention, quantization only", f"this library, {every.scales} scales", None, schedule=rounded, bits="fp8"),
            _method("fps", "FPSAttention", f"this library, schedule {name}, {scales}", None, schedule=schedule, bits="fp8"),
            _method(
                "fps-pseudo", "FPSAttention, pseudo-keys", f"schedule {name}, skipped tiles compensated", None, schedule=schedule,
                bits="fp8", compensate=True,
            ),
            _method("paper-fp8", "FPSAttention as published, quantization only", f"{every.scales} scales, P / 448, no K smoothing", paper, bits="fp8"),
        ]
    )  # fmt: skip


DEFAULT = ("sage", "sparge", "svg", "sta", "fps-fp8", "fps")  # the rows of the paper's Table 2, dense apart


def choose(
    names: str | list[str], schedule: Schedule, density: float = 0.2, granularity: Granularity = "tile"
) -> list[Method]:
    """Methods by name ("sage,fps"); ConfigError on an unknown one. "dense" is always run and need not be named."""
    known = methods(schedule, density, granularity)
    wanted = names.split(",") if isinstance(names, str) else names
    wanted = [name.strip() for name in wanted if name.strip() and name.strip() != "dense"]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"fpsattention.compare: method {unknown[0] if unknown else names!r}, expected some of {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(wanted)]
