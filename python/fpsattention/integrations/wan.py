"""The attention processor that replaces Wan's own on self-attention. A plain object: it adds nothing to the state dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..ops.attend import attend
from .levels import Call, Part

#: Called with (layer name, q, k, v, output); q, k, v ``(B, S, H, D)`` after RoPE, output ``(B, S, H * D)``.
Observer = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs, as Wan applies it: ``x (B, S, H, D)``, ``cos, sin (1, S, 1, D)``."""
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2).type_as(x)


def project(
    attn: WanAttention, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v ``(B, S, H, D)`` of a Wan self-attention: (fused or LoRA-carrying) projections, norms, RoPE."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key = attn.norm_q(query), attn.norm_k(key)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    if rotary_emb is not None:
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
    return query, key, value


def attend_part(query: Tensor, key: Tensor, value: Tensor, part: Part) -> Tensor:
    """FP8 attention of one kernel launch, on ``(B, S, H, D)``; returns the same shape, contiguous.

    The mask comes ready from the pre-hook, so nothing of it is rebuilt or checked per layer.

    Autocast leaves q and k in FP32 beside a 16-bit v, and the kernels want one 16-bit dtype on a GPU: everything goes to e4m3
    next, so the cast costs nothing that counts.
    """
    dtype = value.dtype
    if dtype == torch.float32 and value.device.type != "cpu":
        dtype = torch.bfloat16
    query, key, value = (x.to(dtype) for x in (query, key, value))
    assert part.mask is not None
    return attend(query, key, value, part.mask, granularity=part.granularity)[0]


class FPSWanAttnProcessor(WanAttnProcessor):
    """Self-attention of one Wan block, as the ``call`` that the transformer's pre-hook left says.

    Args:
        original: the processor it replaces; bf16 levels run it, so that they are the model's own attention to the bit.
        name: of the attention module, for messages.
        on_unsupported: ``"raise"`` or ``"dense"``.
    """

    def __init__(self, original: WanAttnProcessor, name: str, on_unsupported: str):
        super().__init__()
        self.original = original
        self.name = name
        self.on_unsupported = on_unsupported
        self.call: Call | None = None
        self.observers: list[Observer] = []
        self.executions: Counter[str] = Counter()  # eager ones: by level, "" where only the device knows it
        self.fallbacks: Counter[str] = Counter()

    # diffusers sets these two on every processor (set_attention_backend, enable_parallelism): they are the original's.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As ``WanAttnProcessor.__call__``; ``hidden_states (B, S, C)``."""
        reason = self._unsupported(encoder_hidden_states, attention_mask)
        if reason is not None:
            if self.on_unsupported == "raise":
                raise UnsupportedError(
                    f'fpsattention.apply: {self.name} {reason}: call remove(), or apply(..., on_unsupported="dense")'
                )
            if not torch.compiler.is_compiling():
                self.fallbacks[reason] += 1
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        call = self._checked_call(hidden_states)
        if not torch.compiler.is_compiling():
            self.executions.update(call.levels or ("",) * hidden_states.shape[0])
        if len(call.parts) == 1:
            return self._run(attn, hidden_states, rotary_emb, call, call.parts[0])
        assert call.order is not None  # several parts: there is an order, and each names its samples
        outs = []
        for part in call.parts:
            assert part.samples is not None
            outs.append(self._run(attn, hidden_states.index_select(0, part.samples), rotary_emb, call, part))
        return torch.cat(outs).index_select(0, call.order)

    def _unsupported(self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> str | None:
        if attention_mask is not None:
            return "got an attention_mask, wanted None (the block mask comes from the schedule)"
        if encoder_hidden_states is not None:
            return "got encoder_hidden_states, wanted None (only self-attention is replaced)"
        if self._parallel_config is not None:
            return "runs under context parallelism, wanted whole sequences (no _parallel_config)"
        return None

    def _checked_call(self, hidden_states: Tensor) -> Call:
        call = self.call
        if call is None:
            raise ConfigError(
                f"fpsattention.apply: {self.name} ran before its transformer's forward: the grid and sigma are read there"
            )
        if hidden_states.shape[1] != call.num_tokens:
            raise ConfigError(
                f"fpsattention.apply: {self.name} got {hidden_states.shape[1]} tokens, wanted {call.num_tokens} = grid {call.grid}: "
                "it runs with the state of another forward (a checkpointed block recomputed outside of "
                "transformer.enable_gradient_checkpointing?)"
            )
        return call

    def _run(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None,
        call: Call,
        part: Part,
    ) -> Tensor:
        observing = bool(self.observers) and not torch.compiler.is_compiling()
        if part.mask is None:
            out = self.original(attn, hidden_states, None, None, rotary_emb)
            if observing:
                with torch.no_grad():
                    qkv = project(attn, hidden_states, rotary_emb)
                self._observe(*qkv, out)
            return out
        query, key, value = project(attn, hidden_states, rotary_emb)
        out = attend_part(query, key, value, part)
        if observing:
            self._observe(query, key, value, out)
        out = out.flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))

    def _observe(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        for observer in self.observers:
            observer(self.name, query, key, value, out)
