"""Norm and RoPE of q and k inside of the quantizer (``torch.ops.fpsattn.prepare``), in models whose own code runs around it.

The code of the attention runs with a view of its module that has no norms, and without its rotary tables, so its core is called with the
projections as they are. What they lack goes beside them (:class:`Raw`): an FP8 launch hands it to the quantizer, any other launch of the
same batch or graph applies it first, as the model does. ``Adapter.prepare`` says what a family's code does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout.plain import is_fake
from ..ops.checks import HEAD_DIMS
from ..ops.norm_rope import rotate
from ..ops.prepare import Norm, Rope
from .adapters import Preparation

if TYPE_CHECKING:
    from .engine import Engine
    from .forward import Forward

MODES = (False, True, "auto")
_NORMS = {
    "torch.nn.modules.normalization.RMSNorm": "rms",
    "diffusers.models.normalization.RMSNorm": "rms",
    "diffusers.models.normalization.MochiRMSNorm": "rms",
    "torch.nn.modules.normalization.LayerNorm": "layer",
}


class WithoutNorms:
    """An attention module as its code sees it, whose norms of q and k are identities."""

    def __init__(self, module: Any):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @staticmethod
    def norm_q(x: Tensor) -> Tensor:
        return x

    norm_k = norm_added_q = norm_added_k = norm_q


@dataclass(frozen=True)
class Raw:
    """What q and k ``(B, S, H, D)`` of a core call lack.

    Attributes:
        module: has the norms ``norm_{q,k}`` and, of text that comes with projections of its own, ``norm_added_{q,k}``.
        kind: of the norms, as in :class:`Norm`.
        video: tokens of the video, whose norms are ``norm_{q,k}``.
        cos, sin: ``(1 or B, 1 or H, n, D/2)`` of the video tokens, or of all; or None: nothing is rotated.
        style: as in :class:`Rope`.
        text_first: other tokens come before those of the video.
        as_complex: the model rotates all tokens by a product of complex numbers.
    """

    module: Any
    kind: str
    video: int
    cos: Tensor | None
    sin: Tensor | None
    style: str
    text_first: bool
    as_complex: bool = False

    def select(self, samples: Tensor | None) -> Raw:
        """Of some samples."""
        if samples is None or self.cos is None or self.sin is None or self.cos.shape[0] == 1:
            return self
        return replace(self, cos=self.cos.index_select(0, samples), sin=self.sin.index_select(0, samples))

    def run(self, count: int, tokens: int) -> tuple[int, int]:
        """Where the ``count`` last, or first, of so many tokens are."""
        return (tokens - count, tokens) if self.text_first else (0, count)

    def norm(self, tokens: int) -> Norm | None:
        """For q of so many tokens: its weights as they are now, the text's own as a second row."""
        norms = [(getattr(self.module, f"norm_{x}"), getattr(self.module, f"norm_added_{x}", None)) for x in "qk"]
        if norms[0][0] is None:
            return None
        q_weight, k_weight = (_rows("weight", *both) for both in norms)
        q_bias, k_bias = (_rows("bias", *both) for both in norms)
        of_video = None if norms[0][1] is None else self.run(self.video, tokens)
        return Norm(self.kind, q_weight, k_weight, q_bias, k_bias, norms[0][0].eps, of_video)

    def rope(self, tokens: int) -> Rope | None:
        """For q of so many tokens."""
        if self.cos is None or self.sin is None:
            return None
        return Rope(self.cos, self.sin, self.style, self.run(self.cos.shape[2], tokens)[0])

    def finish(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k as the model makes them, in its own norms and with its roundings."""
        return self._finish(q, "q"), self._finish(k, "k")

    def _finish(self, x: Tensor, name: str) -> Tensor:
        norm, added = getattr(self.module, f"norm_{name}"), getattr(self.module, f"norm_added_{name}", None)
        if added is None:
            x = self._normed(norm, x)
        else:
            begin, end = self.run(self.video, x.shape[1])
            parts = (x[:, :begin], added), (x[:, begin:end], norm), (x[:, end:], added)
            x = torch.cat([self._normed(own, part) for part, own in parts if part.shape[1]], 1)
        if self.cos is None or self.sin is None:
            return x
        if self.as_complex:  # rounded as the model's own product, in which a GPU fuses a sum
            angles = torch.complex(self.cos, self.sin).transpose(1, 2)
            turned = torch.view_as_complex(x.float().unflatten(3, (-1, 2))) * angles
            return torch.view_as_real(turned).flatten(3).to(x.dtype)
        where = slice(*self.run(self.cos.shape[2], x.shape[1]))
        rotated = rotate(x.transpose(1, 2), self.cos, self.sin, self.style == "halves", where)
        return rotated.to(x.dtype).transpose(1, 2)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        if norm is None:
            return x
        return norm(x.flatten(2)).view_as(x) if self.kind == "rms_across_heads" else norm(x)


def raw_of(preparation: Preparation, module: Any, video: Tensor, tables: Any, forward: Forward) -> Raw:
    """What the code of ``module`` would have done with its norms and the rotary tables that it was given, beside ``video (B, tokens, C)``."""
    cos = sin = None
    if tables is not None:
        known = forward.rope
        if known is not None and known[0] is tables:
            _, cos, sin = known
        else:
            cos, sin = _rotation(preparation, module, tables, forward.owner)
            if not torch.compiler.is_compiling():  # every layer gets the same tables
                forward.rope = (tables, cos, sin)
    as_complex = tables is not None and tables[0].is_complex()
    style, text_first = preparation.style, forward.text_first
    return Raw(module, preparation.kind, video.shape[1], cos, sin, style, text_first, as_complex)


def _rotation(preparation: Preparation, module: Any, tables: Any, owner: Engine) -> tuple[Tensor, Tensor]:
    """cos and sin of the tables that a model brings, which are checked; their numbers once, since that waits for the device.

    Raises:
        UnsupportedError: they are others than the adapter says.
    """
    what = "fpsattention.apply: prepare: the rotary tables"
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        raise UnsupportedError(
            f"{what} are a {type(tables).__name__}, expected a pair of cos and sin: leave prepare out"
        )
    cos, sin = (x.contiguous() for x in preparation.tables(tables, module.heads))
    half = (head_dim_of(module) or 2 * cos.shape[-1]) // 2
    for x in (cos, sin):
        if x.is_complex() or x.ndim != 4 or x.shape[3] != half:
            raise UnsupportedError(
                f"{what} come out as {x.dtype} {tuple(x.shape)}, expected real numbers (1 or B, 1 or H, n, {half}): leave prepare out"
            )
    if (
        preparation.twice
        and not torch.compiler.is_compiling()
        and not owner.tables_seen
        and not (is_fake(cos) or cos.is_meta)
    ):
        if not all(torch.equal(x[..., 0::2], x[..., 1::2]) for x in tables):
            raise UnsupportedError(
                f"{what} hold two angles for a pair of channels, expected every angle twice, side by side: leave prepare out"
            )
        owner.tables_seen = True
    return cos, sin


def head_dim_of(module: Any) -> int | None:
    """Channels per head of an attention of diffusers, None where it does not say."""
    inner, heads = getattr(module, "inner_dim", None), getattr(module, "heads", None)
    return inner // heads if isinstance(inner, int) and isinstance(heads, int) else None


def why_not(preparation: Preparation, module: Any, running: bool = False) -> str | None:
    """Why the quantizer cannot do what the norms of an attention do (a clause that follows its name), or None. ``running``: its code does,
    when weights that FSDP2 shards between forwards are whole."""
    head_dim = head_dim_of(module)
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"has head dimension {head_dim}, expected one of {HEAD_DIMS}"
    named = {name: getattr(module, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    own = [norm for norm in named.values() if norm is not None]
    if (named["norm_q"] is None) != (named["norm_k"] is None):
        return "normalizes one of q and k, expected both or none"
    if getattr(module, "add_q_proj", None) is not None and (named["norm_q"] is None) != (named["norm_added_q"] is None):
        return "normalizes one of video and text, expected both or none"
    for name, norm in named.items():
        if norm is None:
            continue
        kind = _NORMS.get(f"{type(norm).__module__}.{type(norm).__qualname__}", "")
        if kind != preparation.kind.removesuffix("_across_heads"):
            return f"has a {type(norm).__name__} as {name}, expected the {preparation.kind} norm of its family"
        if "forward" in norm.__dict__ or any(len(getattr(norm, hooks)) for hooks in _HOOKS):
            return f"has hooks on {name} (offloading, casting), expected none: they run with the norm's own code"
        if norm.eps is None or norm.eps != own[0].eps:
            return f"has eps {norm.eps} in {name}, expected one number for all norms"
        for tensor in ("weight", "bias"):
            x = getattr(norm, tensor, None)
            if running and x is not None and type(x.data).__name__ == "DTensor":
                return f"has a DTensor as the {tensor} of {name} in the forward, expected a plain one"
    if (named["norm_added_q"] is None) != (named["norm_added_k"] is None):
        return "normalizes one of q and k of the text, expected both or none"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _rows(name: str, norm: Any, added: Any) -> Tensor | None:
    """A weight or bias: of one norm, or of the two."""
    own, of_text = getattr(norm, name, None), getattr(added, name, None)
    return own if own is None or of_text is None else torch.stack([own, of_text])
