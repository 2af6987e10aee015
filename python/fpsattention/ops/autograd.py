"""Derivatives of ``fpsattn::attention``: straight-through, from the saved FP8 operands (``docs/numerics.md``).

Saved are the quantized tensors and their scales, the output, the row maxima and sums, and the block lists: no copies of
q, k, v. Derivatives pass the quantizers and the K smoothing as identity. Only ``out`` is differentiable, once: in reverse
mode (``fpsattn::backward``) and, on the CPU, in forward mode (``fpsattn::jvp``). All else raises, and nothing is silently zero.

The kernels are registered here, not with ``torch.library.register_autograd``, because that drops forward-mode tangents without a word
and does not work under ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ConfigError, UnsupportedError
from . import vmap
from .norm_rope import norm_rope_backward

_NUM_OUTPUTS = 10  # of attention
_ONCE = "only first derivatives are supported: those of fpsattention.attention are not differentiable"
MESSAGES = {
    "backward": f"fpsattention.backward: double backward was asked for, {_ONCE} (drop create_graph=True)",
    "jvp": f"fpsattention.jvp: a derivative of a forward-mode derivative was asked for, {_ONCE} (detach the tangent)",
    **{
        op: f"fpsattention.{op}: a gradient was asked through torch.ops.fpsattn.{op}, which has none: torch.ops.fpsattn.attention "
        "and fpsattention.attention are differentiable"
        for op in ("quantize", "prepare", "forward")
    },
}  # fmt: skip


def _below_autograd(op: str, *args: Any, **options: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.fpsattn, op).default(*args, **options)


_NUM_ARGUMENTS = 14  # of attention, but for the keyword ones
#: By the number of their positional arguments.
_COMPOSITES = {_NUM_ARGUMENTS: "attention", 13: "attention_masked", 10: "attention_selected"}


class _Attention(torch.autograd.Function):
    """``fpsattn::attention``, or a variant of it: its positional arguments and, last, a dict of the keyword ones."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *args, options = inputs
        return _below_autograd(_COMPOSITES[len(args)], *args, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *args, options = inputs
        _q, k, _v, token_of_slot, tile_of_block, _offsets, *others = args
        kv_token_of_slot = args[12] if _COMPOSITES[len(args)] == "attention" else None
        out, lse, *saved = output[:_NUM_OUTPUTS]  # q8 .. v_scale, row_max, row_sum
        made = output[_NUM_OUTPUTS:]  # lists and densities
        kv_num_blocks, kv_indices, q_num_blocks, q_indices = (made or others)[:4]
        _check_transposed(ctx, q_num_blocks, q_indices)
        ctx.mark_non_differentiable(lse, *saved, *made)
        ctx.set_materialize_grads(False)
        ctx.num_inputs, ctx.num_outputs = len(inputs), len(output)
        ctx.softmax_scale = options["softmax_scale"]
        ctx.deterministic = options.get("deterministic", False)
        ctx.num_kv_tokens = 0 if kv_token_of_slot is None else k.shape[2]
        lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices)
        ctx.save_for_backward(out, *saved, *lists, q_num_blocks, q_indices, kv_token_of_slot)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(out, *saved, *lists, kv_token_of_slot)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * ctx.num_inputs
        out, *saved = ctx.saved_tensors
        gradients = call(
            "backward", _like(grad_out, out), out, *saved,
            softmax_scale=ctx.softmax_scale, deterministic=ctx.deterministic, num_kv_tokens=ctx.num_kv_tokens,
        )  # fmt: skip
        wanted = (g if n else None for g, n in zip(gradients, ctx.needs_input_grad[:3], strict=True))
        return (*wanted, *(None,) * (ctx.num_inputs - 3))

    @staticmethod
    def jvp(ctx: Any, q: Tensor | None, k: Tensor | None, v: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_for_forward
        tangents = (x if x is None else _like(x, out) for x in (q, k, v))
        tangent = call("jvp", *tangents, out, *saved, softmax_scale=ctx.softmax_scale)
        return (tangent, *(None,) * (ctx.num_outputs - 1))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        *args, options = inputs
        op = _COMPOSITES[len(args)]
        return vmap.rule(op, partial(call, op))(info, in_dims[:-1], *args, **options)


class _AttentionPrepared(torch.autograd.Function):
    """``fpsattn::attention_prepared``: straight through the quantizers, then through RoPE and norm as they are."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *args, options = inputs
        return _below_autograd("attention_prepared", *args, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, _v, token_of_slot, tile_of_block, _offsets, *lists = inputs[:10]
        _check_transposed(ctx, *lists[2:])
        out, lse, *saved = output
        ctx.mark_non_differentiable(lse, *saved)
        ctx.set_materialize_grads(False)
        ctx.num_inputs, ctx.options = len(inputs), inputs[-1]
        ctx.save_for_backward(inputs[18], q, k, *inputs[10:16], out, *saved, token_of_slot, tile_of_block, *lists)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * ctx.num_inputs
        hidden, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, out, *saved = ctx.saved_tensors
        options = dict(ctx.options)
        attention = {name: options[name] for name in ("softmax_scale", "deterministic")}
        of_position = ("norm", "eps", "rope_halves", "first_rotated", "weights_begin", "weights_end")
        position = {name: options[name] for name in of_position}
        d_q, d_k, d_v = call("backward", _like(grad_out, out), out, *saved, **attention)
        if hidden is not None:  # the kernels leave a gradient there, which is of no key, and no weight may see
            d_k = d_k.masked_fill(hidden[:, None, :, None], 0)
        d_q, d_q_weight, d_q_bias = norm_rope_backward(d_q, q, q_weight, q_bias, cos, sin, **position)
        d_k, d_k_weight, d_k_bias = norm_rope_backward(d_k, k, k_weight, k_bias, cos, sin, **position)
        # In (B, S, H, D) memory, as the op's own gradients: branches of a graph must agree.
        d_q, d_k = (x.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (d_q, d_k))
        of_tokens, of_weights = (d_q, d_k, d_v), (d_q_weight, d_k_weight, d_q_bias, d_k_bias)
        wanted = [None] * ctx.num_inputs
        for place, gradient in (*enumerate(of_tokens), *enumerate(of_weights, 10)):
            wanted[place] = gradient if ctx.needs_input_grad[place] else None
        return tuple(wanted)


def _check_transposed(ctx: Any, q_num_blocks: Tensor | None, q_indices: Tensor | None) -> None:
    if any(ctx.needs_input_grad) and (q_num_blocks is None or q_indices is None or q_indices.dim() != 4):
        raise ConfigError(
            "fpsattention.attention: q_num_blocks and q_indices are missing, but q, k or v requires grad: the backward walks "
            "the transposed block lists; pass those of block_mask.transpose(), or call under torch.no_grad()"
        )


def _like(x: Tensor, out: Tensor) -> Tensor:
    """In the dtype of ``out`` and with unit stride in D, which an expanded or transposed gradient, e.g. that of sum(), lacks."""
    x = x.to(out.dtype)
    return x if x.stride(3) == 1 else x.contiguous()


def refusing(op: str, run: Callable[..., Any]) -> type[torch.autograd.Function]:
    """``run(*args, **options)`` as it is, and the error of ``op`` where a derivative of it is asked."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            *args, options = inputs
            return run(*args, **options)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise UnsupportedError(MESSAGES[op])

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> Any:
            raise UnsupportedError(MESSAGES[op])

        @staticmethod
        def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
            *args, options = inputs
            return vmap.rule(op, partial(call, op))(info, in_dims[:-1], *args, **options)

    return Refusing


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "attention": _Attention,
    "attention_masked": _Attention,
    "attention_selected": _Attention,
    "attention_prepared": _AttentionPrepared,
    **{op: refusing(op, partial(_below_autograd, op)) for op in MESSAGES},
}


def call(op: str, *args: Any, **options: Any) -> Any:
    """``torch.ops.fpsattn.<op>``, also inside of ``torch.func`` transforms, whose functions must be met before the dispatcher."""
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[op].apply(*_all(op, args), options)
    return getattr(torch.ops.fpsattn, op)(*args, **options)


def _all(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With the trailing defaults that a caller or the dispatcher left out."""
    return (*args, *(None,) * (_NUM_ARGUMENTS - len(args))) if op == "attention" else args


def _kernel(op: str) -> Callable[..., Any]:
    """The autograd kernel of an op."""

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        differentiated = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if differentiated or forward_ad._current_level >= 0:
            if torch._C._are_functorch_transforms_active():
                raise UnsupportedError(
                    f"fpsattention.{op}: torch.ops.fpsattn.{op} was called inside a transform of torch.func that differentiates, "
                    "which fpsattention.attention supports: call that"
                )
            return _FUNCTIONS[op].apply(*_all(op, args), options)
        with torch._C._AutoDispatchBelowAutograd():
            overload = getattr(torch.ops.fpsattn, op).default
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    return kernel


def register(library: torch.library.Library) -> None:
    """Autograd kernels of all ops."""
    for op in _FUNCTIONS:
        library.impl(op, _kernel(op), "Autograd", with_keyset=True)
