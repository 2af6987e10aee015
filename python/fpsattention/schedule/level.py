"""A level of a schedule: a precision, what shares a scale, and whom the tokens attend."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..patterns import BoundPattern

PRECISIONS = ("fp8", "int8", "paper", "bf16")
LINEARS = ("fp8", "bf16")
GRANULARITIES = ("tile", "block", "token")
GRANULARITY_WANTED = "'tile', 'block', 'token', or a size of scale groups [t, h, w] in tokens"

#: Extent in tiles ``(wT, wH, wW)``, a target density in (0, 1], or None: every tile.
Window = tuple[int, int, int] | float | None
#: What shares a scale: one of :data:`GRANULARITIES`, or a box of ``(t, h, w)`` tokens, whole tiles along each axis.
Granularity = str | tuple[int, int, int]


@dataclass(frozen=True)
class Level:
    """What a layer does: ``precision="bf16"`` is the model's own dense attention, whatever its dtype, and ``linears="bf16"`` its own
    linear layers.

    Attributes:
        precision: "int8": Q and K as in SageAttention, scales per block (CPU tensors only); P and V as with "fp8". "paper": FP8 with P as
            FPSAttention's paper has it (``e4m3(448 exp(x - m))``) and without K smoothing (CPU tensors, eager, only).
        granularity: of the FP8 scales of Q and K; "block" with "int8". A size ``(t, h, w)`` in tokens is a scale group of several tiles: a multiple
            of the schedule's ``tile`` on each axis.
        window: the tiles that a tile attends. ``pattern`` is the other way to say so: a rule of :mod:`fpsattention.patterns`
            (``patterns.get("topk_mean", ratio=0.1)``, or its dict), scored on the layer's q and k where it reads them.
        refresh: steps of a sampling run that a scored mask stays, >= 1.
        hadamard: q and k are rotated before they are quantized (``fpsattention.attention``), which changes no score of a pattern but for rounding.
    """

    name: str
    precision: str = "fp8"
    granularity: Granularity = "tile"
    window: Window = None
    linears: str = "bf16"
    pattern: BoundPattern | None = None
    refresh: int = 1
    hadamard: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pattern, Mapping):
            from ..patterns import from_dict

            object.__setattr__(self, "pattern", from_dict(self.pattern))
        if isinstance(self.granularity, list):
            object.__setattr__(self, "granularity", tuple(self.granularity))
        if self.precision not in PRECISIONS or not _is_granularity(self.granularity):
            raise fault(
                f'levels["{self.name}"]',
                f"has precision {self.precision!r} and granularity {self.granularity!r}",
                f"precision in {PRECISIONS} and granularity {GRANULARITY_WANTED}",
            )
        if self.linears not in LINEARS:
            raise fault(f'levels["{self.name}"]', f"has linears {self.linears!r}", f"one of {LINEARS}")
        if self.precision == "int8" and self.granularity != "block":
            path = f'levels["{self.name}"].granularity'
            raise fault(path, f"is {self.granularity!r}", "'block': that is what INT8 scales are shared by")
        if not isinstance(self.hadamard, bool) or (self.hadamard and self.precision == "bf16"):
            wanted = "true or false" if self.precision != "bf16" else "false: bf16 is the model's own attention"
            raise fault(f'levels["{self.name}"].hadamard', f"is {self.hadamard!r}", wanted)
        self._check_pattern()

    def _check_pattern(self) -> None:
        path = f'levels["{self.name}"]'
        if isinstance(self.refresh, bool) or not isinstance(self.refresh, int) or self.refresh < 1:
            raise fault(f"{path}.refresh", f"is {self.refresh!r}", "a whole number of steps, at least 1")
        if self.pattern is None:
            if self.refresh != 1:
                raise fault(f"{path}.refresh", f"is {self.refresh}", "a pattern beside it: a window does not change")
            return
        if not callable(self.pattern) or not hasattr(self.pattern, "to_dict"):
            raise fault(
                f"{path}.pattern", f"is {self.pattern!r}", 'patterns.get(...) or {"name": ..., hyperparameters}'
            )
        if self.precision == "bf16" or self.window is not None:
            raise fault(path, "has a pattern and is bf16 or has a window", "a pattern, or one of them")
        if self.scale_group and self.pattern.pattern.permutes:
            wanted = f"one of {GRANULARITIES} beside {self.pattern.name}, which permutes the tokens"
            raise fault(f"{path}.granularity", f"is {list(self.granularity)}", wanted)
        if self.refresh != 1 and self.pattern.static:
            came = f"is {self.refresh}"
            raise fault(f"{path}.refresh", came, f"1: the mask of {self.pattern.name} depends on the layout only")

    @property
    def dynamic(self) -> bool:
        """Its mask depends on q and k."""
        return self.pattern is not None and not self.pattern.static

    @property
    def scale_group(self) -> tuple[int, int, int] | None:
        """The size of its scale groups in tokens, where ``granularity`` is one."""
        return None if isinstance(self.granularity, str) else self.granularity

    @property
    def scales(self) -> str:
        """``granularity`` as text: "tile", "12x16x16"."""
        return self.granularity if isinstance(self.granularity, str) else "x".join(map(str, self.granularity))

    @property
    def kernel_class(self) -> tuple[str, ...]:
        """What the host must know to launch a kernel. Levels that share it are switched by data on the device."""
        if self.precision == "bf16":
            return (self.precision, "", "")
        launch = (self.precision, self.scales, "hadamard" if self.hadamard else "")
        if self.pattern is not None and self.dynamic:
            kept = f"{self.refresh} {self.name}" if self.refresh > 1 else ""  # masks stay with their level
            return (*launch, json.dumps(self.pattern.to_dict(), sort_keys=True), kept)
        return launch

    def of_layer(self, layer: int) -> Level:
        """The level as layer ``layer`` has it: a pattern whose rule changes from layer to layer is told which one it is."""
        if self.pattern is None or (pattern := self.pattern.of_layer(layer)) is self.pattern:
            return self
        return dataclasses.replace(self, pattern=pattern)

    def to_dict(self) -> dict[str, Any]:
        """The level's entry under ``levels`` in the file."""
        linears = {} if self.linears == "bf16" else {"linears": self.linears}
        if self.precision == "bf16":
            return {"precision": "bf16", **linears}
        granularity = self.granularity if isinstance(self.granularity, str) else list(self.granularity)
        data: dict[str, Any] = {"precision": self.precision, "granularity": granularity}
        data |= {"hadamard": True} if self.hadamard else {}
        if self.pattern is None:
            return {**data, "window": window_to_json(self.window), **linears}
        data["pattern"] = self.pattern.to_dict()
        return {**data, **({"refresh": self.refresh} if self.refresh != 1 else {}), **linears}


def window_to_json(window: Window) -> Any:
    """``[wT, wH, wW]``, ``{"density": d}`` or ``"dense"``."""
    if window is None:
        return "dense"
    return {"density": window} if isinstance(window, float) else list(window)


def fault(path: str, came: str, wanted: str) -> ConfigError:
    """The error about a place in a schedule file."""
    return ConfigError(f"fpsattention.Schedule: {path} {came}, expected {wanted}")


def _is_granularity(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 3 and all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in value)
    return value in GRANULARITIES
