"""One forward of one transformer, on the thread that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .levels import Call, index_of
from .selection import Step
from .tokens import Tokens

if TYPE_CHECKING:
    from ..parallel.model import ForwardShard
    from .engine import Engine
    from .linears import Mode, Shared
    from .token_order import Order


@dataclass(eq=False)
class Forward:
    """What the transformer's pre-hook read from the arguments of its forward.

    Attributes:
        owner: whose transformer runs.
        tokens: of the self-attention; None: the text length shows at the first attention.
        segments: of every sample, on the host or on the device.
        calls: what each group of layers does; empty until ``tokens`` is known, and where all layers are compiled.
        graph_calls: the same for compiled layers; empty where there are none.
        executed: runs of each layer's attention core so far, outside of compiled code.
        step: of a sampling run, where masks outlive a step.
        before: the forward that runs around this one, of another transformer.
    """

    owner: Engine
    tokens: Tokens | None
    segments: Tensor | Sequence[int]
    device: torch.device
    backward: bool
    calls: tuple[Call, ...] = ()
    graph_calls: tuple[Call, ...] = ()
    executed: list[int] = field(default_factory=list)
    before: Forward | None = None
    step: Step = None
    video: Tokens | None = None  # with text_len 0, where the text length was left open
    refused: str | None = None  # why all of it is dense
    runs: list[int] = field(default_factory=list)  # of each layer, where a model calls its core sample by sample
    by_samples: dict[tuple[tuple[int, ...], int], tuple[Call, ...]] = field(default_factory=dict)
    parallel: ForwardShard | None = None  # how its tokens are spread over ranks
    linears: tuple[Mode, ...] = ()  # of each group of layers; empty: all the model's own
    shared: Shared | None = None
    text_first: bool = False  # tokens beyond the grid come before it
    prepare: tuple[bool, ...] = ()  # of each group of layers: norm and RoPE run in the quantizer; empty: nowhere
    prepared: dict[int, int] = field(
        default_factory=dict
    )  # layer to samples for which they did, outside of compiled code
    rope: tuple[Any, Tensor, Tensor] | None = (
        None  # rotary tables as the model made them, and as the quantizer takes them
    )
    order: Order | None = None  # the tokens are in tile order
    places: int = 0  # where they were moved so far

    def call(self, group: int, num_tokens: int, device: torch.device) -> Call:
        """The call of a group of layers, for q of ``num_tokens`` tokens on ``device``. Not for traced code."""
        if self.tokens is None:
            self._close(num_tokens)
        if not self.calls or device != self.device:  # a part of the model may be on another device
            if isinstance(self.segments, Tensor):
                self.segments = self.segments.to(device)
            self.device = device
            self.calls = self.owner.tables.calls(self.tokens, device, self.segments, self.backward)  # type: ignore[arg-type]
        return self.calls[group]

    def call_of(self, samples: tuple[int, ...], text_len: int, group: int, device: torch.device) -> Call:
        """The call of a group of layers for some samples, which have ``text_len`` text tokens. Not for traced code."""
        key = (samples, text_len)
        if key not in self.by_samples:
            tokens = (self.tokens or self.video)._replace(text_len=text_len)  # type: ignore[union-attr]
            segments: Tensor | Sequence[int]
            if isinstance(self.segments, Tensor):
                segments = self.segments.to(device).index_select(0, index_of(samples, device))
            else:
                segments = tuple(self.segments[sample] for sample in samples)
            calls = self.owner.tables.calls(tokens, device, segments, self.backward)
            self.by_samples[key] = tuple(replace(call, samples=samples) for call in calls)
        return self.by_samples[key][group]

    def next_sample(self, layer: int) -> int:
        """Which sample a layer sees, where it sees them one by one, in order; again from the first when it is recomputed."""
        self.runs = self.runs or [0] * len(self.executed)
        sample = self.runs[layer] % len(self.segments)
        self.runs[layer] += 1
        return sample

    def _close(self, num_tokens: int) -> None:
        """The text is what the sequence has beyond the grid."""
        assert self.video is not None
        t, h, w = self.video.grid
        text_len = num_tokens - t * h * w
        if text_len < 0:
            raise ConfigError(
                f"fpsattention.apply: {self.owner.name}: attention over {num_tokens} tokens, expected at least those of grid {self.video.grid}"
            )
        self.tokens = self.video._replace(text_len=text_len)
