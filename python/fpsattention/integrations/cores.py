"""Core swap: the model's own attention code, with only its attention call replaced.

Projections, norms, RoPE, output projection, LoRA, fused weights stay the model's own code, whatever version of it is installed: a
stand-in runs the same code object over a copy of its module's names, in which the core function (``core_calls``) is ours. The
core then runs FP8 attention, or, where a level or a refusal says dense, the very call that the model would have made.

The code is that of the module's processor (diffusers), or of its ``forward`` where it has none (other code).
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import torch
import torch.nn.functional

from ..errors import UnsupportedError
from .core_calls import CORES, DIFFUSERS
from .site import Site
from .state import CURRENT


def core_of(module: Any, wanted: str | None = None) -> str:
    """The name of the core that the attention ``module`` calls.

    Raises:
        UnsupportedError: it calls none that is known, or several, or carries weights, or cannot be read.
    """
    processor = _processor(module)
    if is_swapped(processor):
        processor = processor.original
    function: Any = type(module).forward if processor is None else getattr(type(processor), "__call__", None)  # noqa: B004
    what = f"has the processor {type(processor).__name__}" if processor is not None else f"is a {type(module).__name__}"
    if isinstance(processor, torch.nn.Module):
        raise UnsupportedError(f"{what} with weights of its own, expected a plain one")
    if not isinstance(function, types.FunctionType):
        raise UnsupportedError(f"{what} without Python code, expected a class with __call__")
    if processor is None and not is_swapped(own := _own_forward(module)) and own is not None:
        raise UnsupportedError(f"{what} with a forward of its own on the instance, expected that of its class")
    names = [name for name in ((wanted,) if wanted else DIFFUSERS) if name in function.__code__.co_names]
    if len(names) != 1 or names[0] not in CORES:
        raise UnsupportedError(f"{what}, whose code does not call {wanted or ' or '.join(DIFFUSERS)}")
    if names[0] in function.__globals__:
        CORES[names[0]](function.__globals__[names[0]])  # its parameters are known
    elif not any(value is torch.nn.functional for value in function.__globals__.values()):
        raise UnsupportedError(f"{what}, whose code calls {names[0]} through a longer path, expected F.{names[0]}")
    return names[0]


@functools.cache
def _clone(function: Any, core: str) -> Any:
    """``function`` with its core replaced. One per function, so that compiled blocks share their code."""
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
    return run


@functools.cache
def _swapped_class(original: type, core: str) -> type:
    """A subclass of the processor class ``original`` with slots ``site`` and ``original``."""
    function: Any = original.__call__
    run = _clone(function, core)

    names = function.__code__.co_varnames[2 : function.__code__.co_argcount]  # after self and the module

    @functools.wraps(function)  # diffusers filters keyword arguments by the signature
    def call(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        now, site = CURRENT.now, self.site
        before, now["site"] = (now["site"], now["raw"]), site
        try:
            if site.prepare is not None:
                module, args, kwargs = site.bare(module, names, args, kwargs)
            out = run(self, module, *args, **kwargs)
            if now["raw"] is not None and not now["taken"]:
                raise UnsupportedError(
                    f"fpsattention.apply: prepare: {site.name} took q and k elsewhere than to {core}, without their norms: leave prepare out"
                )
            return out
        finally:
            now["site"], now["raw"] = before

    members = {"__slots__": ("site", "original"), "__call__": call, "__reduce__": _reduce, "__setstate__": _set_state}
    swapped = type(f"FPS{original.__name__}", (original,), members)
    _register_like(swapped, original)
    return swapped


class SwappedForward:
    """What stands in for the forward of ``module`` at ``site``, as an attribute of the instance."""

    def __init__(self, module: Any, site: Site):
        self.__setstate__((module, site))

    def __setstate__(self, state: tuple[Any, Site]) -> None:
        self.module, self.site = state
        self.run = _clone(type(self.module).forward, self.site.core)

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (SwappedForward,), (self.module, self.site)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, CURRENT.site = CURRENT.site, self.site
        try:
            return self.run(self.module, *args, **kwargs)
        finally:
            CURRENT.site = before


def swap(module: Any, site: Site) -> Any:
    """Put a stand-in for the code of an attention ``module`` in its place, and return it. A processor's attributes are shared
    with it, so settings made on either reach both."""
    processor = _processor(module)
    if processor is None:
        module.forward = SwappedForward(module, site)
        return module.forward
    stand_in: Any = object.__new__(_swapped_class(type(processor), site.core))  # type: ignore[arg-type]
    stand_in.__setstate__((processor, site))
    _set_processor(module, stand_in)
    return stand_in


def installed(module: Any) -> Any:
    """What runs in ``module`` now: its processor, or a forward of the instance (None: that of its class)."""
    processor = _processor(module)
    return _own_forward(module) if processor is None else processor


def restore(module: Any) -> None:
    """Undo :func:`swap`."""
    processor = _processor(module)
    if processor is not None:
        _set_processor(module, processor.original)
    elif "_old_forward" in vars(module):  # a hook of accelerate, which came later, calls it
        module._old_forward = types.MethodType(type(module).forward, module)
    else:
        del module.forward


def is_swapped(code: Any) -> bool:
    """Whether :func:`swap` made it."""
    return isinstance(code, SwappedForward) or (hasattr(code, "site") and type(code).__reduce__ is _reduce)


def _processor(module: Any) -> Any:
    return getattr(module, "processor", None)


def _own_forward(module: Any) -> Any:
    return vars(module).get("_old_forward", vars(module).get("forward"))


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


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
