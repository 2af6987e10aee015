"""Paper mode: FPSAttention as arXiv 2506.04648 writes it, where it says something. ``docs/paper.md`` goes through it line by line.

Everything here is the library's own op with the paper's settings: windows truncated by distance, scale groups of several tiles, no K smoothing, a
phase per denoising *step*. Probabilities are those of the kernels, rounded against an integer row maximum, or with ``precision="paper"`` those of
the paper, on the CPU. FP8 feed-forward layers are ``fps.apply(..., linears="fp8")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import patterns
from .errors import ConfigError
from .layout.masks import BlockMask
from .layout.tiles import Int3, TileLayout, int3, plan
from .ops.attend import attend
from .schedule import Level, Schedule

PHASES = ("coarse", "fine", "intermediate")


@dataclass(frozen=True)
class PaperPhase:
    """Window W in tiles and granularity g in tokens, a multiple of the tile."""

    window: Int3
    granularity: Int3


#: The sizes are those of the paper's Tables 3 and 4; which phase has which is not published, and is ours.
DEFAULT_PHASES: dict[str, PaperPhase] = {
    "coarse": PaperPhase((3, 3, 1), (24, 32, 32)),
    "fine": PaperPhase((6, 6, 6), (6, 8, 8)),
    "intermediate": PaperPhase((6, 6, 1), (12, 16, 16)),
}


@dataclass(frozen=True)
class PaperMode:
    """``S(t)`` of the paper (Eq. 6) and its attention.

    Attributes:
        alpha1, alpha2: of D denoising steps, ``t <= alpha1 D`` are coarse and sparse, ``t <= alpha2 D`` fine and dense, the later ones
            intermediate. Not published: no default.
        tile: (6, 8, 8).
        phases: of :data:`PHASES`.
        precision: "paper": probabilities as published, ``e4m3(448 exp(x - m))``, on CPU tensors or with ``backend="reference"`` only; "fp8": those
            of the kernels (``docs/numerics.md``).
    """

    alpha1: float
    alpha2: float
    tile: Int3 = (6, 8, 8)
    phases: Mapping[str, PaperPhase] = field(default_factory=lambda: dict(DEFAULT_PHASES))
    precision: str = "fp8"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha1 <= self.alpha2 <= 1.0:
            raise ConfigError(
                f"fpsattention.PaperMode: alphas {self.alpha1}, {self.alpha2}, expected 0 <= alpha1 <= alpha2 <= 1"
            )
        if self.precision not in ("fp8", "paper"):
            raise ConfigError(f"fpsattention.PaperMode: precision {self.precision!r}, expected 'fp8' or 'paper'")
        if set(self.phases) != set(PHASES):
            raise ConfigError(f"fpsattention.PaperMode: phases {sorted(self.phases)}, expected {', '.join(PHASES)}")

    def phase(self, step: int, num_steps: int) -> str:
        """The phase of step ``t`` in 1..D, the first (noisiest) step being 1."""
        if not 1 <= step <= num_steps:
            raise ConfigError(f"fpsattention.PaperMode: step {step} of {num_steps}, expected 1 to {num_steps}")
        if step <= self.alpha1 * num_steps + 1e-9:
            return "coarse"
        return "fine" if step <= self.alpha2 * num_steps + 1e-9 else "intermediate"

    def layout(self, grid: Int3) -> TileLayout:
        """Tiles of the paper's size on this grid; those at the far borders are smaller (no padding tokens)."""
        return plan(int3(grid, "PaperMode: grid"), self.tile)

    def mask(self, grid: Int3, phase: str) -> BlockMask:
        """The window of a phase, truncated by distance (Eq. 3)."""
        return patterns.sliding_tile(self.layout(grid), window=self._phase(phase).window, border="truncate")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, grid: Int3, phase: str, backend: str = "auto") -> Tensor:
        """FP8 attention of one phase; differentiable. q, k, v ``(B, S, H, D)``."""
        mask = self.mask(grid, phase).to(q.device)
        options: dict[str, Any] = {"granularity": self._phase(phase).granularity, "precision": self.precision}
        return attend(q, k, v, mask, smooth_k=False, backend=backend, **options)[0]

    def schedule(self, scheduler: Any, num_steps: int) -> Schedule:
        """The same phases as a schedule for ``fps.apply`` and the trainer, at the sigmas that ``scheduler`` visits in D steps.

        Its windows are these, truncated at borders, and so are its scale groups. With precision "paper" K is not smoothed; the levels of "fp8"
        smooth it.
        """
        steps = [self.phase(step, num_steps) for step in range(1, num_steps + 1)]
        levels = {
            name: Level(
                name,
                self.precision,
                self._phase(name).granularity,
                pattern=patterns.get("sliding_tile", window=self._phase(name).window, border="truncate"),
            )
            for name in PHASES
        }
        provenance = {"created_by": "fpsattention", "paper": "2506.04648", "alphas": [self.alpha1, self.alpha2]}
        return Schedule.from_steps(steps, scheduler, levels, tile=self.tile, provenance=provenance)

    def _phase(self, name: str) -> PaperPhase:
        if name not in self.phases:
            raise ConfigError(f"fpsattention.PaperMode: phase {name!r}, expected one of {', '.join(PHASES)}")
        return self.phases[name]
