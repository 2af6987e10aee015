"""Which implementation serves a call: the sm_90a kernels, the CPU kernels, or the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..layout.masks import Lists
from ..layout.plain import constant
from . import autograd, core, reference
from .checks import check_hidden, check_quantize
from .hidden import hide, slots

BACKENDS = ("auto", "sm90", "cpu", "reference")
_DOCTOR = "run `fpsattn doctor` for what is missing and how to mend it"


def resolve_backend(backend: str, q: Tensor) -> str:
    """ "sm90", "cpu" or "reference" for tensors like q.

    Raises:
        ConfigError: an unknown backend, or tensors that it does not take. UnsupportedError: it cannot run here.
    """
    if backend not in BACKENDS:
        raise _fail(f"backend {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    device = q.device
    if backend == "auto":
        if device.type not in ("cpu", "cuda", "meta"):
            raise UnsupportedError(
                f"fpsattention.attention: q is on {device}, supported are CUDA (sm_90) and the CPU: move q, k and v"
            )
        if device.type == "meta":  # shapes only
            return "cpu"
        backend = "sm90" if device.type == "cuda" or core.sm90_on_host() else "cpu"
    if backend == "cpu":
        if device.type != "cpu":
            raise _fail(f"backend 'cpu' but q is on {device}: pass CPU tensors, or backend='auto'")
        if core.sm90_on_host():
            raise UnsupportedError(
                "fpsattention.attention: backend 'cpu', but FPSATTN_SM90_ON_HOST=1 gave CPU tensors to the sm_90a kernels in this "
                "process: start one without it, or pass backend='auto' or 'reference'"
            )
    if backend == "sm90":
        problem = sm90_problem(device)
        if problem:
            raise UnsupportedError(
                f"fpsattention.attention: the sm_90a kernels cannot take q on {device}: {problem}; {_DOCTOR}"
            )
    return backend


@constant
def sm90_problem(device: torch.device) -> str:
    """Why the sm_90a kernels cannot run on ``device``; "" where they can."""
    missing = core.sm90_missing()
    if missing:
        return missing
    if device.type == "cpu":
        if core.sm90_on_host():
            return ""
        return "they need a CUDA tensor (FPSATTN_SM90_ON_HOST=1 is for running them under an emulator)"
    if device.type != "cuda":
        return "they need a CUDA tensor"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (9, 0):
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}, they are built for 9.0 (Hopper: H100, H200, H20); backend='reference' runs anywhere, slowly"


def _fail(text: str) -> ConfigError:
    return ConfigError(f"fpsattention.attention: {text}")


_BACKWARD = autograd.refusing("backward", reference.backward)
_JVP = autograd.refusing("jvp", reference.jvp)


class _Reference(torch.autograd.Function):
    """``reference.py`` with its straight-through derivatives."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, lists: Lists, softmax_scale: float, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        hidden = options.pop("hidden", None)
        quantized = reference.quantize(q, k, v, lists.token_of_slot, lists.tile_block_offsets, **options)
        if hidden is not None:
            quantized = hide(quantized, slots(hidden, lists.token_of_slot))
        result = reference.forward(
            *quantized.operands, lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices,
            quantized.q_k_mean, num_tokens=q.shape[2], softmax_scale=softmax_scale, out_dtype=q.dtype,
        )  # fmt: skip
        return (result.out, result.lse, *quantized.operands, result.row_max, result.row_sum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        lists, ctx.softmax_scale, options = inputs[3:]
        out, lse, *saved = output
        ctx.mark_non_differentiable(lse, *saved)
        ctx.set_materialize_grads(False)
        tables = (
            lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices,
            options.get("kv_token_of_slot"),
        )  # fmt: skip
        ctx.save_for_backward(out, *saved, *tables)
        ctx.save_for_forward(out, *saved, *tables)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 6
        out, *saved = ctx.saved_tensors
        gradients = _BACKWARD.apply(grad_out, out, *saved, {"softmax_scale": ctx.softmax_scale})
        return (*(g.to(out.dtype) for g in gradients), None, None, None)

    @staticmethod
    def jvp(ctx: Any, q: Tensor | None, k: Tensor | None, v: Tensor | None, *_: Any) -> tuple[Any, ...]:
        out, *saved = ctx.saved_for_forward
        tangent = _JVP.apply(q, k, v, out, *saved, {"softmax_scale": ctx.softmax_scale})
        return (tangent.to(out.dtype), *(None,) * 9)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise UnsupportedError(
            "fpsattention.attention: vmap of backend 'reference' was asked for: backend 'cpu' has it"
        )


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, softmax_scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the reference, computed on the CPU whatever the device of q; always deterministic.

    Args:
        q, k, v: ``(B, H, S, D)``.
        options: of :func:`reference.quantize`; ``hidden``, as of :func:`attend`.
    """
    hidden = options.pop("hidden", None)
    check_quantize(q, k, v, lists.token_of_slot, lists.tile_block_offsets, **options)
    if hidden is not None:
        check_hidden(q, hidden, lists.token_of_slot)
        options["hidden"] = hidden
    on_cpu = lists.to("cpu")
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    out, lse, *_ = _Reference.apply(q.cpu(), k.cpu(), v.cpu(), on_cpu, softmax_scale, options)
    return out.to(q.device), lse.to(q.device)
