"""Core swap: the model's own attention processor, with only its attention call replaced.

Projections, norms, RoPE, output projection, LoRA, fused weights stay the model's own code, whatever version of it is installed: a
swapped processor runs the same code object over a copy of its module's names, in which the core function is ours. The
core then runs FP8 attention, or, where a level or a refusal says dense, the very call that the model would have made.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor

from ..errors import UnsupportedError
from .site import Site
from .state import CURRENT


@dataclass(frozen=True)
class CoreCall:
    """What a core was called with. ``q, k, v (B, S, H, D)``; ``dense(q, k, v)`` is the model's own call, on all samples; on some
    samples or tokens with a mask for them as fourth argument. ``parallel``: diffusers' config, where tokens are spread over ranks.
    ``heads``: which of ``num_heads`` these are, where heads are (``fpsattention.parallel``)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dense: Callable[..., Tensor]
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    parallel: Any = None
    heads: tuple[int, ...] | None = None
    num_heads: int = 0


def _run(call: CoreCall) -> Tensor:
    site = CURRENT.site
    assert site is not None  # set by the processor that called
    return site.attend(call)


def _dispatch(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """diffusers' ``dispatch_attention_fn``: ``(B, S, H, D)``."""

    def dispatch_attention_fn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        def dense(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = attn_mask, parallel_config: Any = parallel_config
        ) -> Tensor:
            return original(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )

        return _run(CoreCall(query, key, value, dense, attn_mask, is_causal, scale, dropout_p, parallel_config))

    return dispatch_attention_fn


def _sdpa(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.nn.functional.scaled_dot_product_attention``: ``(B, H, S, D)``."""

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = attn_mask) -> Tensor:
            out = original(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            return out.transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return _run(CoreCall(q, k, v, dense, attn_mask, is_causal, scale, dropout_p)).transpose(1, 2)

    return scaled_dot_product_attention


#: Name of a core function in a processor's code to what replaces it, given the original.
CORES: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "dispatch_attention_fn": _dispatch,
    "scaled_dot_product_attention": _sdpa,
}


def core_of(processor: Any, wanted: str | None = None) -> str:
    """The name of the core that ``processor`` calls.

    Raises:
        UnsupportedError: it calls none that is known, or several, or carries weights, or cannot be read.
    """
    kind = type(processor).__name__
    function = getattr(type(processor), "__call__", None)  # noqa: B004 (its code is wanted)
    if isinstance(processor, torch.nn.Module):
        raise UnsupportedError(f"has the processor {kind} with weights of its own, wanted a plain one")
    if not isinstance(function, types.FunctionType):
        raise UnsupportedError(f"has the processor {kind} without Python code, wanted a class with __call__")
    names = [name for name in ((wanted,) if wanted else CORES) if name in function.__code__.co_names]
    if len(names) != 1 or names[0] not in CORES:
        known = wanted or " or ".join(CORES)
        raise UnsupportedError(f"has the processor {kind}, whose code does not call {known}")
    return names[0]


@functools.cache
def _swapped_class(original: type, core: str) -> type:
    """A subclass of ``original`` with slots ``site`` and ``original``. One per class, so that compiled blocks share their code."""
    function: Any = original.__call__
    names = dict(function.__globals__)
    names.pop("__name__", None)  # Dynamo would look names up in the original module
    if core in names:
        names[core] = CORES[core](names[core])
    else:  # an attribute of torch.nn.functional, under whatever name that is imported
        functional = types.ModuleType("functional")
        functional.__dict__.update(vars(torch.nn.functional))
        setattr(functional, core, CORES[core](getattr(torch.nn.functional, core)))
        names.update({name: functional for name, value in names.items() if value is torch.nn.functional})
    run = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    run.__kwdefaults__ = function.__kwdefaults__

    @functools.wraps(function)  # diffusers filters keyword arguments by the signature
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, CURRENT.site = CURRENT.site, self.site
        try:
            return run(self, *args, **kwargs)
        finally:
            CURRENT.site = before

    members = {"__slots__": ("site", "original"), "__call__": call, "__reduce__": _reduce, "__setstate__": _set_state}
    swapped = type(f"FPS{original.__name__}", (original,), members)
    _register_like(swapped, original)
    return swapped


def swap(processor: Any, core: str, site: Site) -> Any:
    """What stands in for ``processor`` at ``site``. Attributes are shared with it, so settings made on either reach both."""
    stand_in: Any = object.__new__(_swapped_class(type(processor), core))  # type: ignore[arg-type]
    stand_in.__setstate__((processor, site))
    return stand_in


def is_swapped(processor: Any) -> bool:
    """Whether :func:`swap` made it."""
    return hasattr(processor, "site") and type(processor).__reduce__ is _reduce


def _set_state(self: Any, state: tuple[Any, Site]) -> None:
    self.original, self.site = state
    self.__dict__ = self.original.__dict__


def _reduce(self: Any) -> tuple[Any, ...]:
    """Copies and pickles: the class is made anew from the original one."""
    return _revive, (type(self.original), self.site.core), (self.original, self.site)


def _revive(original: type, core: str) -> Any:
    return object.__new__(_swapped_class(original, core))


def _register_like(swapped: type, original: type) -> None:
    """diffusers' caches (FasterCache, PAB, ...) look processors up by their exact class."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry as registry
    except ImportError:
        return
    with contextlib.suppress(ValueError):  # the original is not there either
        registry.register(swapped, registry.get(original))
