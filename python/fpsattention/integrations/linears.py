"""FP8 linears under a schedule: the linear layers of a model's blocks, which a level runs in FP8 or as the model's own.

A layer stays the module that it was, with its parameters and its place in the state dict; only its class is changed to
:class:`ScheduledLinear`, so that whatever wraps it (LoRA), casts or moves its weights (layerwise casting, offload), copies or shards it
meets an ordinary ``nn.Linear``. Which layers: ``Adapter.linears``.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..ops.attend import autocast
from ..ops.linear import ALIGNMENT, fp8_linear, quantize_rows, why_not
from .state import CURRENT

if TYPE_CHECKING:
    from .forward import Forward
    from .installation import Installation

#: Of one layer in one forward: all samples in FP8, none, or bool ``[B]``: those that are.
Mode = bool | Tensor
_SHARED = ("to_q", "to_k", "to_v")  # read the same activations, which are quantized once


@dataclass(eq=False)
class Shared:
    """Activations that several layers read: ``x`` as it came, its quantized rows, and how many layers have yet to read them."""

    x: Tensor
    version: int
    quantized: tuple[Tensor, Tensor]
    left: int


@dataclass(eq=False)
class LinearSite:
    """One linear layer under a schedule.

    Attributes:
        owner: the installation.
        name: path of the module, for messages.
        group: of layers that read the schedule alike.
        readers: layers that read the same activations, itself included.
    """

    owner: Installation
    name: str
    group: int
    readers: int = 1


class ScheduledLinear(torch.nn.Linear):
    """An ``nn.Linear`` whose ``fps_site`` says whether it runs in FP8; without one it is an ``nn.Linear``."""

    fps_site: LinearSite | None = None

    def forward(self, input: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        site = getattr(self, "fps_site", None)
        if site is None:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        if site.owner.paused:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        forward, compiling = CURRENT.forward, torch.compiler.is_compiling()
        if forward is None or not (compiling or forward.owner is site.owner):
            raise ConfigError(
                f"fpsattention.apply: {site.name} ran outside of a forward of its transformer, where sigma is read: call "
                "transformer(...), not transformer.forward(...)"
            )
        mode: Mode = forward.linears[site.group] if forward.linears else False
        if isinstance(mode, bool) and not mode:
            return torch.nn.functional.linear(input, self.weight, self.bias)
        reason = why_not(input.device)
        if reason is None and type(self.weight.data).__name__ == "DTensor":
            reason = "its weight is a DTensor in the forward (tensor parallelism), expected a plain one"
        if reason is not None:
            if site.owner.on_unsupported == "raise":
                raise UnsupportedError(
                    f'fpsattention.apply: {site.name}: {reason}: use levels with linears "bf16", or apply(..., on_unsupported="dense")'
                )
            if not compiling:
                with site.owner._lock:
                    site.owner.refused_linears[f"{site.name}: {reason}"] += 1
            return torch.nn.functional.linear(input, self.weight, self.bias)
        quantized = None if site.readers == 1 else _shared(forward, input, site.readers)
        out = fp8_linear(input, self.weight, self.bias, quantized)
        if isinstance(mode, bool):
            return out
        if mode.shape[0] != input.shape[0]:
            raise ConfigError(
                f"fpsattention.apply: {site.name} got {input.shape[0]} samples, expected {mode.shape[0]}: they are at levels with different linears"
            )
        own = torch.nn.functional.linear(input, self.weight, self.bias)
        return torch.where(mode.view(-1, *[1] * (out.dim() - 1)), out.to(own.dtype), own)


def _shared(forward: Forward, x: Tensor, readers: int) -> tuple[Tensor, Tensor]:
    """The quantized rows of ``x``: once for all its readers. In a graph that is being traced, too: inductor does not merge them."""
    known, version = forward.shared, 0
    if not (torch.compiler.is_compiling() or x.is_inference()):
        version = x._version
    if known is not None and known.x is x and known.version == version:
        known.left -= 1
        if known.left == 0:
            forward.shared = None
        return known.quantized
    quantized = quantize_rows(autocast(x).detach().reshape(-1, x.shape[-1]))
    forward.shared = Shared(x, version, quantized, readers - 1)
    return quantized


class Linears:
    """The linear layers of one transformer that a schedule may run in FP8.

    Args:
        layers: index and path of each attention whose block has layers under the schedule, e.g. ``blocks.3.attn1``.

    Raises:
        UnsupportedError: a layer is not an ordinary linear layer, and ``on_unsupported`` is "raise". Nothing was changed then.
    """

    def __init__(self, owner: Installation, layers: Sequence[tuple[int, str]]):
        self.owner = owner
        self.layers = tuple(layers)
        self.own: dict[str, str] = {}  # name to why a layer stays the model's own
        self.installed: dict[str, torch.nn.Linear] = {}
        self._fused: list[bool] = []
        if layers and not owner.adapter.linears:
            raise UnsupportedError(
                f"fpsattention.apply: linears of {owner.adapter.name} are not known, expected a family whose adapter names them "
                "(fpsattn models): leave linears out"
            )
        found = list(self._find())
        refused = {name: reason for name, module, _, _ in found if (reason := _refusal(module)) is not None}
        if refused and owner.on_unsupported == "raise":
            name, reason = next(iter(refused.items()))
            raise UnsupportedError(f'fpsattention.apply: {name} {reason}: leave linears out, or on_unsupported="dense"')
        self._install(found)

    def _find(self) -> Iterator[tuple[str, Any, int, int]]:
        """Name, module, layer and number of readers of its input."""
        for layer, path in self.layers:
            block_path, _, attention = path.rpartition(".")
            block = self.owner.transformer.get_submodule(block_path)
            found = {
                name: module for name in self.owner.adapter.linears if (module := _submodule(block, name)) is not None
            }
            if f"{attention}.to_qkv" in found:
                found = {n: m for n, m in found.items() if n.removeprefix(f"{attention}.") not in _SHARED}
            together = [name for name in found if name.removeprefix(f"{attention}.") in _SHARED]
            for name, module in found.items():
                readers = len(together) if name in together else 1
                yield f"{self.owner.name}.{block_path}.{name}", module, layer, readers

    def _install(self, found: Sequence[tuple[str, Any, int, int]]) -> None:
        self.own.clear()
        for name, module, layer, readers in found:
            if (reason := _refusal(module)) is not None:
                self.own[name] = reason
                continue
            group = self.owner.tables.group_of_layer[layer]
            module.__class__ = ScheduledLinear
            module.fps_site = LinearSite(self.owner, name, group, readers)
            _rebind(module)
            self.installed[name] = module
        self._fused = self._fusions()

    def _fusions(self) -> list[bool]:
        return [bool(getattr(self.owner.modules[layer], "fused_projections", False)) for layer, _ in self.layers]

    def refresh(self) -> None:
        """Follow ``fuse_qkv_projections`` and its undoing. Forwards that begin at the same time wait for whoever is first."""
        with self.owner._lock:
            if self.layers and self._fused != self._fusions():
                self.remove()
                self._install(list(self._find()))

    def count(self, layer: int) -> int:
        """Layers under the schedule in the block of an attention."""
        prefix = (
            f"{self.owner.name}.{dict(self.layers)[layer].rpartition('.')[0]}." if layer in dict(self.layers) else None
        )
        return sum(name.startswith(prefix) for name in self.installed) if prefix else 0

    def remove(self) -> None:
        """Every layer is an ``nn.Linear`` again, also below hooks that keep its forward."""
        for module in self.installed.values():
            module.__dict__.pop("fps_site", None)
            module.__class__ = torch.nn.Linear
            _rebind(module)
        self.installed.clear()


def _submodule(block: torch.nn.Module, name: str) -> Any:
    """The layer below LoRA and other wrappers, or None where the block has none of that name."""
    module: Any = block
    for part in name.split("."):
        module = module[int(part)] if part.isdigit() and len(module) > int(part) else getattr(module, part, None)
        if module is None:
            return None
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _refusal(module: Any) -> str | None:
    if type(module) not in (torch.nn.Linear, ScheduledLinear):
        return f"is a {type(module).__name__}, expected an nn.Linear"
    if type(module.weight.data).__name__ not in ("Tensor", "DTensor"):  # the latter: FSDP2 shards it between forwards
        return f"has weights that are quantized already ({type(module.weight.data).__name__}), expected 16-bit or FP32 ones"
    if module.weight.shape[0] % ALIGNMENT or module.weight.shape[1] % ALIGNMENT:
        return f"has a weight of shape {tuple(module.weight.shape)}, expected multiples of {ALIGNMENT}"
    if "forward" in vars(module) and not any(_bound(holder, name, module) for holder, name in _keepers(module)):
        return "has a forward of its own, expected that of nn.Linear: apply first, then wrap it"
    return None


def _keepers(module: Any) -> Iterator[tuple[Any, str]]:
    """Where hooks keep the forward that they wrapped: accelerate's (offload), diffusers' (layerwise casting, group offload)."""
    yield module, "_old_forward"
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def _bound(holder: Any, name: str, module: Any) -> bool:
    kept = vars(holder).get(name)
    functions = (torch.nn.Linear.forward, ScheduledLinear.forward)
    return isinstance(kept, types.MethodType) and kept.__self__ is module and kept.__func__ in functions


def _rebind(module: Any) -> None:
    """Hooks that came before keep the forward of the class that the module had."""
    for holder, name in _keepers(module):
        if _bound(holder, name, module):
            setattr(holder, name, types.MethodType(type(module).forward, module))
