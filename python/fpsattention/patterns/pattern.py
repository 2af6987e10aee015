"""The common form of patterns, and their registry: ``patterns.get("topk_mean", ratio=0.1)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask
from ..layout.tiles import _CLEAR_WITH_PLANS, TileLayout
from ..ops.blocks import MAX_BLOCKS
from .blocks import (
    Scored,
    check_tensors,
    list_width,
    means_of_sums,
    of_query_heads,
    pool_blocks,
    scores_of_means,
    select,
    tables,
    to_mask,
)

_STATIC_CACHE_SIZE = 128
_REGISTRY: dict[str, Pattern] = {}
_PERMUTING: dict[str, Pattern] = {}  # known by name, too, but no masks: not among names()
_MEANS = {"q_means": "q", "k_means": "k"}  # of a rule that reads means over blocks only: of what
_INPUTS = ("q", "k", "v", "layout", "lse", "masses", *_MEANS)  # of a rule; everything else is a hyperparameter


class Density(NamedTuple):
    """Attended share of the (query, key) pairs: what the rule selects (text included), and what the kernel attends for it."""

    selected: float
    kernel: float

    @property
    def ratio(self) -> float:
        """kernel / selected: 1 where the selector and the kernel speak of the same blocks."""
        return self.kernel / self.selected if self.selected else float("inf")


class Pattern:
    """A rule that says which KV blocks the query tiles visit; calling it gives the :class:`BlockMask`.

    Content patterns: ``pattern(q, k, layout, **hyperparameters)`` with q, k ``(B, H, S, D)`` on one device (some also take ``v=`` or
    ``lse=``; k and v may have fewer heads: grouped queries). Static ones: ``pattern(layout, **hyperparameters)``. The own tile and text (both ways) are kept, whatever the rule says.

    Attributes:
        permutes: tokens are permuted as well (:func:`svg2`): its result is no mask.
        name: in the registry and in schedules.
        static: the mask depends on the layout only.
        inputs: tensors the rule reads, of q, k, v, lse.
        pools: of q and k it reads the means over blocks only, so that :meth:`of_sums` can make its lists.
        period: layers after which the rule repeats, where it changes from layer to layer (hyperparameter ``layer``), else 0.
        defaults: hyperparameters; those without a default are ``inspect.Parameter.empty``.
    """

    permutes = False
    pools = False

    def __init__(
        self,
        rule: Callable[..., Tensor],
        width: Callable[..., int] | None = None,
        share: Callable[..., Tensor] | None = None,
        period: int = 0,
        scored: Callable[..., Scored | None] | None = None,  # (scores, layout, hyperparameters)
    ):
        self.period = period
        self._scored = scored  # (scores, layout, hyperparameters) -> a selection by them alone, or None
        self.rule = rule  # (tensors, layout, hyperparameters) -> keep, bool [Bm, Hm, tiles, blocks]
        self.name = rule.__name__
        self.__name__, self.__doc__ = rule.__name__, rule.__doc__
        self._width = width  # (layout, hyperparameters) -> most video blocks of a row
        self._share = (
            share  # (layout, hyperparameters) -> selected share of each (tile, block), where tokens are selected
        )
        parameters = inspect.signature(rule).parameters
        self.pools = "q_means" in parameters
        named = (_MEANS.get(name, name) for name in parameters if name in _INPUTS)
        self.inputs = tuple(name for name in named if name not in ("layout", "masses"))
        self.static = not self.inputs
        self.defaults = {name: p.default for name, p in parameters.items() if name not in _INPUTS}

    def __call__(self, *args: Any, **options: Any) -> BlockMask:
        layout, tensors, hyperparameters = self._arguments(args, options)
        if self.static and not any(isinstance(value, Tensor) for value in hyperparameters.values()):
            return _static_mask(self, layout, tuple(sorted(hyperparameters.items())))
        read = self._read(layout, tensors)
        if (made := self._selected(layout, read, hyperparameters)) is not None:
            return made[0]
        return self._mask(layout, self._kept(layout, read, hyperparameters), hyperparameters)

    def _read(self, layout: TileLayout, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the rule reads, of checked tensors."""
        check_tensors(self.name, layout, grouped=True, **{name: x for name, x in tensors.items() if name != "lse"})
        heads = tensors["q"].shape[1] if "q" in tensors else 0
        with torch.no_grad():
            if self.pools:
                return {name: of_query_heads(pool_blocks(tensors[of], layout), heads) for name, of in _MEANS.items()}
            # A rule that reads tokens reads those of K and V once per query head.
            return {name: of_query_heads(x, heads) if name in ("k", "v") else x for name, x in tensors.items()}

    def _kept(self, layout: TileLayout, read: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]) -> Tensor:
        with torch.no_grad():
            return self.rule(**read, layout=layout, **hyperparameters)

    def _selected(
        self, layout: TileLayout, read: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]
    ) -> tuple[BlockMask, Tensor] | None:
        """By one kernel, where the rule is one that it knows: the same lists."""
        if self._scored is None or layout.num_blocks > MAX_BLOCKS:
            return None
        with torch.no_grad():
            logits = scores_of_means(read["q_means"], read["k_means"], layout)
            scored = self._scored(logits, layout=layout, **{**self.defaults, **hyperparameters})
            return None if scored is None else select(layout, scored, self.width(layout, hyperparameters))

    def of_sums(
        self, q_block_sum: Tensor, k_block_sum: Tensor, layout: TileLayout, **hyperparameters: Any
    ) -> tuple[BlockMask, Tensor]:
        """:meth:`measured` from sums over blocks f32 ``[B, H, blocks, D]``, as ``torch.ops.fpsattn.quantize(block_sums=True)`` gives them, so that
        q and k are not read again. Of patterns that pool (``topk_mean``, ``cdf_mean``, ``draft``, ``vmoba``); ConfigError for others.

        The lists are those of :meth:`measured` but for ties: both sum 128 tokens in FP32, in another order, so entries may change places
        whose scores differ by less than that rounds (about 1e-6 of the largest).
        """
        if not self.pools:
            raise self._error("sums over blocks, which are not all that its lists depend on", f"{', '.join(pooling())}")
        sums = (q_block_sum, of_query_heads(k_block_sum, q_block_sum.shape[1]))
        read = {name: means_of_sums(x, layout) for name, x in zip(_MEANS, sums, strict=True)}
        return self._measured(layout, read, self.check(hyperparameters))

    def select(self, layout: TileLayout, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]) -> Tensor:
        """What the rule alone keeps, bool ``[Bm, Hm, tiles, blocks]``."""
        return self._kept(layout, self._read(layout, tensors), hyperparameters)

    def density(self, *args: Any, **options: Any) -> Density:
        """Selected and kernel density; takes the arguments of a call. Reads values: waits for the device."""
        layout, tensors, hyperparameters = self._arguments(args, options)
        mask = self(*args, **options)
        on_cpu = layout.cpu()
        if self._share is None:
            keep = self.select(layout, tensors, hyperparameters).cpu()
        else:
            keep = self._share(layout=on_cpu, **{**self.defaults, **hyperparameters})[None, None]
        t = tables(on_cpu, torch.device("cpu"))
        share = torch.where(t.text_rows | t.text_columns, 1.0, keep.double())
        pairs = on_cpu.tile_tokens.double()[:, None] * on_cpu.block_tokens.double()
        return Density(float((share * pairs).sum((-1, -2)).mean()) / on_cpu.num_tokens**2, mask.density)

    def measured(self, *args: Any, **options: Any) -> tuple[BlockMask, Tensor]:
        """The mask of a call and its densities, f64 ``[2]`` (selected, kernel) on the device of q: nothing waits."""
        layout, tensors, hyperparameters = self._arguments(args, options)
        return self._measured(layout, self._read(layout, tensors), hyperparameters)

    def _measured(
        self, layout: TileLayout, read: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]
    ) -> tuple[BlockMask, Tensor]:
        if (made := self._selected(layout, read, hyperparameters)) is not None:
            return made
        keep = self._kept(layout, read, hyperparameters)
        t, layout = tables(layout, keep.device), layout.to(keep.device)
        rule = keep | t.text_rows | t.text_columns
        # f32 sums of whole numbers below 2^24 are exact.
        shares = [
            (kept.float() @ t.block_tokens).double() @ layout.tile_tokens.double() for kept in (rule, rule | t.own)
        ]
        densities = torch.stack([share.mean() for share in shares]) / layout.num_tokens**2
        return self._mask(layout, keep, hyperparameters), densities

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are the registered pattern itself."""
        return _registered, (self.name,)

    def width(self, layout: TileLayout, hyperparameters: Mapping[str, Any]) -> int | None:
        """Most video blocks in a row's list, where the hyperparameters tell; the width of the lists."""
        return None if self._width is None else self._width(layout, **{**self.defaults, **hyperparameters})

    def _mask(self, layout: TileLayout, keep: Tensor, hyperparameters: Mapping[str, Any]) -> BlockMask:
        return to_mask(layout, keep, self.width(layout, hyperparameters))

    def _arguments(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[TileLayout, dict[str, Tensor], dict[str, Any]]:
        names = (*(name for name in self.inputs if name in ("q", "k")), "layout")
        if len(args) > len(names):
            raise self._error(f"{len(args)} positional arguments", f"{', '.join(names)}, then keywords")
        given = {**dict(zip(names, args, strict=False)), **options}
        layout = given.pop("layout", None)
        if not isinstance(layout, TileLayout):
            raise self._error(f"layout is {type(layout).__name__}", "a TileLayout (fpsattention.plan)")
        tensors = {}
        for name in self.inputs:
            if given.get(name) is None:
                raise self._error(f"{name} is missing", f"the tensors {', '.join(self.inputs)}")
            tensors[name] = given.pop(name)
        return layout, tensors, self.check(given)

    def check(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters with known names, lists as tuples; ConfigError otherwise. Ranges are checked by the rule."""
        unknown = [name for name in hyperparameters if name not in self.defaults]
        if unknown:
            known = ", ".join(self.defaults) or "none"
            raise self._error(f"hyperparameter {unknown[0]!r}", f"one of {known}")
        missing = [
            name for name, default in self.defaults.items()
            if default is inspect.Parameter.empty and hyperparameters.get(name) is None
        ]  # fmt: skip
        if missing:
            raise self._error(f"hyperparameter {missing[0]!r} is missing", "it has no default")
        return {name: _frozen(value) for name, value in hyperparameters.items()}

    def _error(self, came: str, wanted: str) -> ConfigError:
        return ConfigError(f"fpsattention.patterns.{self.name}: {came}, expected {wanted}")

    def __repr__(self) -> str:
        return f"<pattern {self.name}>"


@dataclass(frozen=True)
class BoundPattern:
    """A pattern and its hyperparameters: what a level of a schedule names. One call for static and content patterns alike."""

    pattern: Pattern
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.hyperparameters.items()))))

    def list_width(self, layout: TileLayout) -> int:
        """Width of the lists of its masks over ``layout``."""
        return list_width(layout, self.pattern.width(layout, self.hyperparameters))

    def of_layer(self, layer: int) -> BoundPattern:
        """With the hyperparameter ``layer`` where the rule changes from layer to layer and none is given; else the same."""
        if not self.pattern.period or "layer" in self.hyperparameters:
            return self
        return BoundPattern(self.pattern, {**self.hyperparameters, "layer": layer % self.pattern.period})

    @property
    def name(self) -> str:
        """Of the pattern."""
        return self.pattern.name

    @property
    def static(self) -> bool:
        """The mask depends on the layout only: it needs no q and k, and is built once."""
        return self.pattern.static

    def __call__(self, q: Tensor | None, k: Tensor | None, layout: TileLayout, **tensors: Tensor | None) -> BlockMask:
        """The mask. Tensors that the pattern does not read (``v``, ``lse``) are ignored; a static pattern reads none."""
        given = {"q": q, "k": k, **tensors}
        wanted = {name: x for name, x in given.items() if name in self.pattern.inputs}
        mask = self.pattern(layout=layout, **wanted, **self.hyperparameters)
        return mask if q is None or mask.device == q.device else mask.to(q.device)

    def to_dict(self) -> dict[str, Any]:
        """``{"name": ..., hyperparameters}``, for JSON; :func:`from_dict` gives the pattern back."""
        return {"name": self.name, **{name: _thawed(value) for name, value in self.hyperparameters.items()}}


def _registered(name: str) -> Pattern:
    return _REGISTRY[name] if name in _REGISTRY else _PERMUTING[name]


def pattern(
    width: Callable[..., int] | None = None,
    share: Callable[..., Tensor] | None = None,
    period: int = 0,
    scored: Callable[..., Scored | None] | None = None,
) -> Callable[[Callable[..., Tensor]], Pattern]:
    """Make a rule a registered :class:`Pattern`."""

    def register(rule: Callable[..., Tensor]) -> Pattern:
        made = Pattern(rule, width, share, period, scored)
        _REGISTRY[made.name] = made
        return made

    return register


def names() -> list[str]:
    """Of all registered patterns."""
    return sorted(_REGISTRY)


def pooling() -> list[str]:
    """Names of the patterns that need no more of q and k than their means over blocks."""
    return sorted(name for name, made in _REGISTRY.items() if made.pools)


def get(name: str, **hyperparameters: Any) -> BoundPattern:
    """The pattern ``name`` with these hyperparameters (defaults for the others).

    Raises:
        ConfigError: on an unknown name or hyperparameter, or one without a value. Ranges are checked when it is called.
    """
    known = {**_REGISTRY, **_PERMUTING}
    if name not in known:
        raise ConfigError(f"fpsattention.patterns.get: name {name!r}, expected one of {', '.join(sorted(known))}")
    return BoundPattern(known[name], known[name].check(hyperparameters))


def from_dict(data: Mapping[str, Any]) -> BoundPattern:
    """From a schedule's JSON: ``{"name": "topk_mean", "ratio": 0.1}``."""
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ConfigError(f'fpsattention.patterns.from_dict: {data!r}, expected {{"name": ..., hyperparameters}}')
    return get(data["name"], **{name: value for name, value in data.items() if name != "name"})


@lru_cache(maxsize=_STATIC_CACHE_SIZE)
def _static_mask(made: Pattern, layout: TileLayout, hyperparameters: tuple[tuple[str, Any], ...]) -> BlockMask:
    options = dict(hyperparameters)
    return made._mask(layout.cpu(), made.select(layout.cpu(), {}, options), options).to(layout.device)


_CLEAR_WITH_PLANS.append(_static_mask.cache_clear)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return [_thawed(item) for item in value] if isinstance(value, (list, tuple)) else value
