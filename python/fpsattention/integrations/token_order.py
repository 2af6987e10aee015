"""Tile order once per forward: tokens are permuted where the blocks begin and put back where they end.

Everything in between is per token, and what is said per token (rotary tables, modulation) is permuted along, so nothing else changes;
the attention finds the tokens of a tile in consecutive rows, and writes them there. ``Adapter.token_order`` says where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from .adapters import Place
from .state import CURRENT

if TYPE_CHECKING:
    from .installation import Installation

ORDERS = ("tile", "raster")


class Order(NamedTuple):
    """int64 indices ``[T * H * W]`` on the device of the latents."""

    to_tile: Tensor
    to_raster: Tensor


def moved(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """``x`` with its first tokens along ``dim`` in another order: those of the video, where text follows."""
    index = index.to(x.device)
    video = index.shape[0]
    if x.shape[dim] == video:
        return x.index_select(dim, index)
    return torch.cat(
        [x.narrow(dim, 0, video).index_select(dim, index), x.narrow(dim, video, x.shape[dim] - video)], dim
    )


@dataclass(eq=False)
class Hook:
    """A forward hook, or for a place on the way back a pre-hook."""

    owner: Installation
    place: Place

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...], *output: Any) -> Any:
        forward, compiling = CURRENT.forward, torch.compiler.is_compiling()
        if forward is None or forward.order is None or not (compiling or forward.owner is self.owner):
            return None
        index = forward.order.to_raster if self.place.back else forward.order.to_tile
        if self.place.back and not arguments:
            raise UnsupportedError(
                f'fpsattention.apply: {self.place.path} got no positional arguments, expected its tokens first: token_order="raster"'
            )
        if not compiling:
            forward.places += 1
        return self.place.change(output[0] if output else arguments, lambda x, dim: moved(x, dim, index))


def install(owner: Installation, token_order: str | None) -> list[Any]:
    """Hooks on the model, and their handles; none where its tokens stay in raster order.

    Args:
        token_order: "tile", "raster", or None: tile where the adapter knows how.

    Raises:
        ConfigError: it is neither. UnsupportedError: "tile" is asked for, and the adapter does not know how.
    """
    if token_order is not None and token_order not in ORDERS:
        raise ConfigError(f"fpsattention.apply: token_order {token_order!r}, expected one of {ORDERS}")
    places = () if token_order == "raster" else owner.adapter.token_order(owner.transformer)
    if token_order == "tile" and not places:
        raise UnsupportedError(
            f'fpsattention.apply: token_order "tile" of this {owner.adapter.name} is not known, expected "raster", or to leave it out'
        )
    handles = []
    for place in places:
        module = owner.transformer.get_submodule(place.path)
        hook = Hook(owner, place)
        handles.append(module.register_forward_pre_hook(hook) if place.back else module.register_forward_hook(hook))
    return handles
