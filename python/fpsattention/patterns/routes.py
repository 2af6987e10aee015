"""VORTA: a router sends each head to full attention, a sliding window, or a coreset of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import dense_mask, sliding_tile_mask
from ..layout.tiles import TileLayout, int3
from .blocks import check_number
from .pattern import pattern

ROUTES = ("full", "window", "coreset")


@pattern()
def vorta(layout: TileLayout, routes: Any, window: tuple[int, int, int]) -> Tensor:
    """VORTA (arXiv 2505.18809; wenhao728/VORTA): full attention or a sliding tile window, by head.

    Args:
        routes: a route per head, ``("full", "window", ...)``, or an integer tensor ``[H]`` or ``[B, H]`` with 0 full, 1 window, on any device: the
            arg-max of the router's softmax over a linear map of the timestep embedding; choosing waits for nothing.
        window: in tiles.

    The third route, "coreset", computes fewer queries and keys and is no mask: :func:`coreset_attention` for those heads.
    """
    masks = torch.cat([mask.to_blocks()[0] for mask in (dense_mask(layout), sliding_tile_mask(layout, window))])
    if isinstance(routes, Tensor):
        if routes.ndim not in (1, 2) or routes.is_floating_point() or routes.dtype == torch.bool:
            raise ConfigError(
                f"fpsattention.patterns.vorta: routes is {routes.dtype} {tuple(routes.shape)}, expected integers [H] or [B, H]"
            )
        return masks.to(routes.device)[routes.long().view((1, -1) if routes.ndim == 1 else routes.shape)]
    if not isinstance(routes, (tuple, list)) or not routes or any(route not in ROUTES[:2] for route in routes):
        raise ConfigError(
            f"fpsattention.patterns.vorta: routes {routes!r}, expected 'full' or 'window' for every head; heads on the route "
            "'coreset' go through patterns.coreset_attention"
        )
    return masks[[ROUTES.index(route) for route in routes]][None]


class Coreset:
    """The tokens that VORTA's third route keeps, and how outputs return to all tokens.

    The grid is cut into groups of ``group`` tokens. Of every group the centre stays, and of the others those least similar (cosine) to
    the centre; the most similar ones are left out and receive the centre's output.

    Args:
        x: ``(B, H, S, D)``, what similarity is measured on; tokens in raster order, no text.
        grid: ``(T, H, W)``, divisible by ``group``.
        group: ``(f, h, w)`` tokens.
        reduction: share of a group's tokens that is left out; ``int(f h w (1 - reduction))`` stay.

    Attributes:
        kept: int64 ``(B, H, K)``, tokens that stay: centres first, then the others, group by group.
        source: int64 ``(B, H, S)``, for each token the place in ``kept`` whose output it takes.
    """

    def __init__(self, x: Tensor, grid: tuple[int, int, int], group: tuple[int, int, int], reduction: float = 0.5):
        grid, group = int3(grid, "patterns.Coreset: grid"), int3(group, "patterns.Coreset: group")
        check_number("Coreset", "reduction", reduction, 0.0, 1.0)
        if min(group) < 1 or any(n % g for n, g in zip(grid, group, strict=True)):
            raise ConfigError(f"fpsattention.patterns.Coreset: group {group}, expected sizes that divide grid {grid}")
        size = group[0] * group[1] * group[2]
        stay = int(size * (1.0 - reduction) + 1e-9)
        if stay < 1:
            raise ConfigError(
                f"fpsattention.patterns.Coreset: reduction {reduction}, expected a token left of groups of {size}"
            )
        tokens = torch.arange(grid[0] * grid[1] * grid[2], device=x.device).view(
            grid[0] // group[0], group[0], grid[1] // group[1], group[1], grid[2] // group[2], group[2]
        )
        tokens = tokens.permute(0, 2, 4, 1, 3, 5).reshape(-1, size)  # [groups, size], raster order within
        centre = (group[0] // 2 * group[1] + group[1] // 2) * group[2] + group[2] // 2
        middle = tokens[:, centre]
        rest = torch.cat([tokens[:, :centre], tokens[:, centre + 1 :]], 1)
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
        similarity = torch.einsum("bhgd,bhgmd->bhgm", unit[:, :, middle], unit[:, :, rest])
        order = rest.expand(*x.shape[:2], -1, -1).gather(-1, similarity.argsort(dim=-1, stable=True))
        alone, merged = order[..., : stay - 1], order[..., stay - 1 :]
        groups = len(tokens)
        self.kept = torch.cat([middle.expand(*x.shape[:2], -1), alone.flatten(2)], 2)
        place = torch.arange(groups, device=x.device).view(-1, 1)
        self.source = torch.empty(x.shape[:3], dtype=torch.int64, device=x.device)
        self.source.scatter_(2, self.kept, torch.arange(self.kept.shape[2], device=x.device).expand_as(self.kept))
        self.source.scatter_(2, merged.flatten(2), place.expand_as(merged).flatten(2))

    def take(self, x: Tensor) -> Tensor:
        """The kept tokens of ``(B, H, S, D)``: ``(B, H, K, D)``."""
        return x.gather(2, self.kept.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

    def give(self, out: Tensor) -> Tensor:
        """Outputs of the kept tokens, ``(B, H, K, D)``, for all tokens, ``(B, H, S, D)``."""
        return out.gather(2, self.source.unsqueeze(-1).expand(-1, -1, -1, out.shape[-1]))


def coreset_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    group: tuple[int, int, int],
    reduction: float = 0.5,
    **options: Any,
) -> Tensor:
    """VORTA's coreset route: FP8 attention among the tokens of a :class:`Coreset` of k, outputs copied to the others.

    Args:
        q, k, v: ``(B, H, S, D)``, S = T * H * W.
        options: of :func:`fpsattention.attention` (``granularity``, ``smooth_k``, ...).
    """
    from ..functional import attention

    coreset = Coreset(k, grid, group, reduction)
    q, k, v = (coreset.take(x) for x in (q, k, v))
    out: Any = attention(q, k, v, grid=(1, 1, q.shape[2]), tensor_layout="HND", **options)
    return coreset.give(out)
