"""Core functions that models call with q, k and v, and what stands in for each: it hands the call to the site at hand.

A stand-in has the parameters of its original, as far as it is told apart by them, and ``dense`` makes the original's own call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .state import CURRENT

if TYPE_CHECKING:
    from .prepared import Raw

Core = Callable[..., Tensor]


@dataclass(eq=False)  # not frozen: that takes three times as long to make, once per layer
class CoreCall:
    """What a core was called with. ``q, k, v (B, S, H, D)``; ``dense(q, k, v)`` is the model's own call, on all samples; on some
    samples, where there is a mask, with theirs as fourth argument. ``parallel``: diffusers' config, where tokens are spread over ranks.
    ``heads``: which of ``num_heads`` these are, where heads are (``fpsattention.parallel``). ``raw``: q and k are projections, which lack
    this, and ``dense`` wants it applied."""

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
    raw: Raw | None = None

    def finished(self) -> CoreCall:
        """With q and k as the model makes them."""
        if self.raw is None:
            return self
        q, k = self.raw.finish(self.q, self.k)
        return replace(self, q=q, k=k, raw=None)


def _run(call: CoreCall) -> Tensor:
    site = CURRENT.site
    assert site is not None  # set by the processor that called
    if CURRENT.raw is None:
        return site.attend(call)
    CURRENT.taken = True
    return site.attend(replace(call, raw=CURRENT.raw))


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


def _flash(original: Core) -> Core:
    """``flash_attention`` of three code bases, told apart by their parameters."""
    names = _parameters(original)
    if names[:1] == ["qkv"] and "k_lens" in names:
        return _wan_list(original)
    if names[:3] == ["q", "k", "v"] and "k_lens" in names:
        return _wan(original)
    if names[:4] == ["q", "k", "v", "num_heads"]:
        return _diffsynth_wan(original)
    raise _unknown("flash_attention", names)


def _attention(original: Core) -> Core:
    """``attention`` of musubi-tuner's models, and of the original Wan code."""
    names = _parameters(original)
    if names[:4] == ["qkv_or_q", "k", "v", "attn_params"]:
        return _musubi(original)
    if names[:3] == ["q", "k", "v"] and "k_lens" in names:
        return _wan(original)
    raise _unknown("attention", names)


def _parameters(original: Core) -> list[str]:
    return list(inspect.signature(original).parameters)


def _unknown(core: str, names: list[str]) -> UnsupportedError:
    return UnsupportedError(f"calls a {core} with parameters ({', '.join(names)}), expected one that is known")


def _wan(original: Core) -> Core:
    """Wan-Video/Wan2.1 and 2.2: ``(B, S, H, D)``; FP32 q and k are cast to 16 bits in there, and the output is like q."""

    @functools.wraps(original)
    def flash_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = inspect.signature(original).bind(q, k, v, *args, **kwargs).arguments
        return _with_lengths(options, lambda q, k, v, options: original(**{**options, "q": q, "k": k, "v": v}))

    return flash_attention


def _wan_list(original: Core) -> Core:
    """musubi-tuner's Wan: as Wan's, with q, k and v in a list, which the call empties."""

    @functools.wraps(original)
    def flash_attention(qkv: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        options = inspect.signature(original).bind(qkv, *args, **kwargs).arguments
        options.update(zip("qkv", options.pop("qkv"), strict=True))
        qkv.clear()

        def dense(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            return original([q, k, v], **{name: x for name, x in options.items() if name not in ("q", "k", "v")})

        return _with_lengths(options, dense)

    return flash_attention


def _with_lengths(options: dict[str, Any], original: Callable[..., Tensor]) -> Tensor:
    """A call whose mask over the keys is ``k_lens``, on the host, one per sample."""
    q, k, v, lengths = options["q"], options["k"], options["v"], options.get("k_lens")
    for name, wanted in (("q_lens", (None,)), ("window_size", ((-1, -1), None)), ("q_scale", (None,))):
        if options.get(name) not in wanted:
            return _refused(f"has {name} {options[name]}, expected {wanted[0]}", lambda: original(q, k, v, options))
    count = k.shape[1]
    mask = None
    if lengths is not None and (shorter := [int(n) for n in lengths]) != [count] * len(shorter):
        mask = torch.arange(count) < torch.tensor(shorter)[:, None]
        mask = mask.to(k.device)[:, None, None]

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        own = options
        if mask is not None:
            own = {**options, "k_lens": mask[:, 0, 0].sum(-1)}
        elif q.shape[0] != len(options["q"]):  # all keys of all samples count, or there would be a mask
            own = {**options, "k_lens": None}
        return original(q, k, v, own)

    causal, scale = bool(options.get("causal")), options.get("softmax_scale")
    call = CoreCall(q, k, v, dense, mask, causal, scale, options.get("dropout_p", 0.0))
    return _run(call).to(q.dtype)


def _diffsynth_wan(original: Core) -> Core:
    """DiffSynth-Studio's Wan: ``(B, S, H D)``."""

    @functools.wraps(original)
    def flash_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *args: Any, **kwargs: Any) -> Tensor:
        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            out = original(*(x.flatten(2) for x in (q, k, v)), num_heads, *args, **kwargs)
            return out.unflatten(2, (num_heads, -1))

        q, k, v = (x.unflatten(2, (num_heads, -1)) for x in (q, k, v))
        return _run(CoreCall(q, k, v, dense)).flatten(2)

    return flash_attention


def _attention_forward(original: Core) -> Core:
    """DiffSynth-Studio's ``attention_forward``: layouts are einops patterns such as "b n s d" and "b s (n d)"."""

    @functools.wraps(original)
    def attention_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(original).bind(q, k, v, *args, **kwargs)
        bound.apply_defaults()
        options = bound.arguments
        patterns = [options[f"{name}_pattern"] for name in ("q", "k", "v", "out")]
        heads = (options.get("dims") or {}).get("n")
        known = all(p in _PATTERNS for p in patterns) and (heads or "b s (n d)" not in patterns)
        special = [name for name in ("window_size", "score_mod", "use_flex") if options.get(name)]
        if not known or special:
            reason = f"has {', '.join(special)}" if special else f"has the layouts {patterns}"
            return _refused(f"{reason}, expected plain attention", lambda: original(**options))
        q, k, v = (_to_nhd(options[name], pattern, heads) for name, pattern in zip("qkv", patterns, strict=False))

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = options["attn_mask"]) -> Tensor:
            nhd = {f"{name}_pattern": "b s n d" for name in ("q", "k", "v", "out")}
            return original(**{**options, **nhd, "q": q, "k": k, "v": v, "attn_mask": mask, "dims": None})

        out = _run(CoreCall(q, k, v, dense, options["attn_mask"], options["is_causal"], options["scale"]))
        return out.transpose(1, 2) if patterns[3] == "b n s d" else out.flatten(2) if "(" in patterns[3] else out

    return attention_forward


_PATTERNS = ("b s n d", "b n s d", "b s (n d)")


def _to_nhd(x: Tensor, pattern: str, heads: int | None) -> Tensor:
    if pattern == "b s (n d)":
        return x.unflatten(2, (heads, -1))  # type: ignore[arg-type]
    return x.transpose(1, 2) if pattern == "b n s d" else x


def _musubi(original: Core) -> Core:
    """musubi-tuner's ``attention``: q, k and v ``(B, S, H, D)``, also in a list, which the call empties; output ``(B, S, H D)``.
    Where text is padded, ``attn_params`` has the number of valid tokens of each sample."""

    @functools.wraps(original)
    def attention(
        qkv_or_q: Tensor | list[Tensor],
        k: Tensor | None = None,
        v: Tensor | None = None,
        attn_params: Any = None,
        drop_rate: float = 0.0,
    ) -> Tensor:
        if isinstance(qkv_or_q, list):
            q, k, v = qkv_or_q
            qkv_or_q.clear()
        else:
            q = qkv_or_q
        assert k is not None and v is not None
        lengths, mask = getattr(attn_params, "seqlens", None), None
        if lengths is not None:
            mask = (torch.arange(k.shape[1], device=k.device) < lengths.to(k.device)[:, None])[:, None, None]
        heads = q.shape[2]

        def dense(q: Tensor, k: Tensor, v: Tensor, some: Tensor | None = None) -> Tensor:
            if some is not None:  # of some samples: its parameters are those of the batch
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=some).transpose(1, 2)
            return original(q, k, v, attn_params, drop_rate).unflatten(2, (heads, -1))

        return _run(CoreCall(q, k, v, dense, mask, dropout=drop_rate)).flatten(2)

    return attention


def _refused(reason: str, dense: Callable[[], Tensor]) -> Tensor:
    site = CURRENT.site
    assert site is not None
    return site.refused(reason, dense)


#: Name of a core function in a model's code to what replaces it, given the original.
CORES: dict[str, Callable[[Core], Core]] = {
    "dispatch_attention_fn": _dispatch,
    "scaled_dot_product_attention": _sdpa,
    "flash_attention": _flash,
    "attention_forward": _attention_forward,
    "attention": _attention,
}

#: Those that are looked for where an adapter names none.
DIFFUSERS: Sequence[str] = ("dispatch_attention_fn", "scaled_dot_product_attention")
