"""Sparse-VideoGen 2 (arXiv 2505.18875): tokens are permuted into clusters of similar ones, per head; clusters attend clusters.

Queries and keys have clusterings, hence orders, of their own: the attention runs on a 1-D layout of blocks of 128 in those orders, which
the kernels take as tables of slots per head. Clusters are not padded to whole blocks: 1000 clusters of 75 tokens would pay 1.7
times the blocks. Instead a block pair is visited if any of its clusters' pairs is chosen; :meth:`Clustered.density` says what that costs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout.masks import BlockMask
from ..layout.tiles import BLOCK, TileLayout, plan
from .blocks import check_count, check_number, check_tensors, of_query_heads, top_p
from .pattern import _PERMUTING, Density, Pattern
from .token_rules import video_offset


def k_means(x: Tensor, clusters: int, iterations: int, centroids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm per (batch, head), fixed shapes.

    Args:
        x: ``(B, H, N, D)``.
        centroids: f32 ``(B, H, clusters, D)`` to start from (kept from step to step); None: evenly spaced tokens.

    Returns:
        labels int64 ``(B, H, N)`` and centroids; a cluster that loses all tokens keeps its centroid.
    """
    x = x.float()
    if centroids is None:
        start = torch.arange(clusters, device=x.device) * x.shape[2] // clusters
        centroids = x.index_select(2, start)

    def nearest(centres: Tensor) -> Tensor:  # |x - c|^2 without |x|^2
        return (centres.square().sum(-1).unsqueeze(-2) - 2 * x @ centres.transpose(-1, -2)).argmin(-1)

    for _ in range(iterations):
        members = torch.nn.functional.one_hot(nearest(centroids), clusters).to(x.dtype)
        counts = members.sum(2).unsqueeze(-1)
        means = members.transpose(-1, -2) @ x / counts.clamp_min(1)
        centroids = torch.where(counts > 0, means, centroids)
    return nearest(centroids), centroids


@dataclass(frozen=True)
class Clustered:
    """What :func:`svg2` makes.

    Attributes:
        mask: over the 1-D layout, ``[B, H]`` lists.
        q_order, k_order: int64 ``(B, H, S)``, of the heads of q and of k: token at each place of the permuted sequences.
        q_centroids, k_centroids: f32 ``(B, H, clusters, D)``, likewise, to start the next step from.
        pairs: f64 ``[B, H]`` on the device, token pairs that the chosen cluster pairs hold.
    """

    mask: BlockMask
    q_order: Tensor
    k_order: Tensor
    q_centroids: Tensor
    k_centroids: Tensor
    pairs: Tensor

    def permuted(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``(B, H, S, D)`` in the orders of :attr:`mask`."""
        return _put(q, self.q_order), _put(k, self.k_order), _put(v, self.k_order)

    def density(self) -> Density:
        """Of the chosen cluster pairs, and of the blocks that hold them. Waits for the device."""
        selected = float(self.pairs.mean()) / self.mask.layout.num_tokens**2
        return Density(selected, self.mask.density)


def svg2(
    q: Tensor,
    k: Tensor,
    layout: TileLayout,
    *,
    q_clusters: int = 300,
    k_clusters: int = 1000,
    mass: float = 0.9,
    min_ratio: float = 0.1,
    iterations: int = 50,
    previous: Clustered | None = None,
) -> Clustered:
    """Clusters of queries attend the smallest set of clusters of keys with ``mass`` of ``P_ij``, proportional to ``|j| exp(scale q_i . k_j)``.

    Args:
        q, k: ``(B, H, S, D)``, k with fewer heads, too (grouped queries): its clusters are those of its heads; text tokens keep their places, attend and are attended by all.
        q_clusters, k_clusters, mass, min_ratio: published 300, 1000, 0.9, and at least ``int(0.1 k_clusters)`` clusters.
        iterations: of k-means: published 50 at the first step, then 2 from the centroids of the step before.
        previous: that step's result.
    """
    check_tensors("svg2", layout, grouped=True, q=q, k=k)
    check_number("svg2", "mass", mass, 0.0, 1.0)
    check_number("svg2", "min_ratio", min_ratio, 0.0, 1.0)
    for name, value in (("q_clusters", q_clusters), ("k_clusters", k_clusters)):
        check_count("svg2", name, value, 1, layout.num_video_tokens)
    check_count("svg2", "iterations", iterations, 0)
    first, count = video_offset(layout), layout.num_video_tokens
    flat = plan((1, 1, count), (1, 1, BLOCK), layout.text_len, layout.text_position).to(q.device)
    with torch.no_grad():
        starts = (None, None) if previous is None else (previous.q_centroids, previous.k_centroids)
        q_labels, q_centres = k_means(q[:, :, first : first + count], q_clusters, iterations, starts[0])
        k_labels, k_centres = k_means(k[:, :, first : first + count], k_clusters, iterations, starts[1])
        q_sizes, k_sizes = (
            torch.nn.functional.one_hot(labels, n).sum(2).double()
            for labels, n in ((q_labels, q_clusters), (k_labels, k_clusters))
        )
        q_order, k_order = q_labels.argsort(dim=-1, stable=True), k_labels.argsort(dim=-1, stable=True)
        columns = _touched(k_labels.gather(-1, k_order), k_clusters)
        centres, k_sizes, columns = (of_query_heads(x, q.shape[1]) for x in (k_centres, k_sizes, columns))
        logits = q_centres @ centres.transpose(-1, -2) * q.shape[-1] ** -0.5 + k_sizes.float().log().unsqueeze(-2)
        chosen = top_p(logits.softmax(-1), mass, int(min_ratio * k_clusters + 1e-9))
        pairs = ((chosen * q_sizes.unsqueeze(-1)).sum(-2) * k_sizes).sum(-1)
        pairs = pairs + layout.text_len * (2 * count + layout.text_len)
        rows = _touched(q_labels.gather(-1, q_order), q_clusters)
        video = (rows @ chosen.float() @ columns.transpose(-1, -2)) > 0
        keep = torch.nn.functional.pad(
            video, (0, flat.num_blocks - video.shape[-1], 0, flat.num_tiles - video.shape[-2])
        )
        mask = BlockMask.from_keep(flat, _with_text(keep, flat))
    return Clustered(mask, _with_rest(q_order, layout), _with_rest(k_order, layout), q_centres, k_centres, pairs)


def _with_text(keep: Tensor, flat: TileLayout) -> Tensor:
    """Text is kept both ways. There is no own tile: query block i and key block i hold different tokens."""
    rows = torch.arange(flat.num_tiles, device=keep.device).unsqueeze(-1) >= flat.num_video_tiles
    columns = torch.arange(flat.num_blocks, device=keep.device) >= flat.num_video_tiles  # a tile is a block there
    return keep | rows | columns


def _touched(labels: Tensor, clusters: int) -> Tensor:
    """Which clusters have tokens in each block of 128 places: f32 0/1 ``[B, H, blocks, clusters]`` from labels in order."""
    blocks = -(-labels.shape[-1] // BLOCK)
    padded = torch.nn.functional.pad(labels, (0, blocks * BLOCK - labels.shape[-1]), value=clusters)
    touched = torch.zeros(*labels.shape[:2], blocks, clusters + 1, device=labels.device)
    return touched.scatter(-1, padded.unflatten(-1, (blocks, BLOCK)), 1.0)[..., :-1]


def _with_rest(order: Tensor, layout: TileLayout) -> Tensor:
    """An order of the video tokens as one of all tokens; text keeps its places."""
    text = torch.arange(layout.text_len, device=order.device).expand(*order.shape[:2], -1)
    if layout.text_position == "prefix":
        return torch.cat([text, order + layout.text_len], -1)
    return torch.cat([order, text + order.shape[-1]], -1)


def _put(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def clustered_attention(q: Tensor, k: Tensor, v: Tensor, clustered: Clustered, **options: Any) -> Tensor:
    """Attention of q, k, v ``(B, H, S, D)`` under :func:`svg2`'s permutations; differentiable.

    One call for all heads, which copies nothing: the kernels gather and scatter by each head's orders. ``options``: those of
    :func:`fpsattention.ops.variants.attend_permuted`.
    """
    from ..ops.variants import attend_permuted

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, _ = attend_permuted(q, k, v, clustered.mask, clustered.q_order, clustered.k_order, **options)
    return out.transpose(1, 2)


class _Svg2(Pattern):
    """:func:`svg2` as a schedule's level names it; what it makes is for :func:`clustered_attention`.

    Hyperparameters: those of :func:`svg2`, and ``later_iterations``: of k-means where there is a step before (published: 2).
    """

    permutes = True

    def __init__(self) -> None:
        parameters = inspect.signature(svg2).parameters
        self.name, self.inputs, self.static, self.period = "svg2", ("q", "k"), False, 0
        self.defaults = {
            name: p.default for name, p in parameters.items() if name not in ("q", "k", "layout", "previous")
        }
        self.defaults["later_iterations"] = 2
        self._width = self._share = self._scored = None

    def __call__(
        self, q: Tensor, k: Tensor, layout: TileLayout, previous: Clustered | None = None, **options: Any
    ) -> Any:
        options = self.check(options)
        later = options.pop("later_iterations", self.defaults["later_iterations"])
        check_count("svg2", "later_iterations", later, 0)
        if previous is not None:
            options["iterations"] = later
        return svg2(q, k, layout, previous=previous, **options)

    def measured(self, *args: Any, **options: Any) -> Any:
        made = self(*args, **options)
        layout = made.mask.layout
        pairs = (made.mask.to_blocks().float() @ layout.block_tokens.float()).double() @ layout.tile_tokens.double()
        return made, torch.stack([made.pairs.mean(), pairs.mean()]) / layout.num_tokens**2

    def density(self, *args: Any, **options: Any) -> Density:
        return self(*args, **options).density()

    def select(self, layout: TileLayout, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]) -> Tensor:
        raise self._error(
            "a selection over the tiles of the layout was expected", "clustered_attention: it permutes tokens"
        )


_PERMUTING["svg2"] = _Svg2()
