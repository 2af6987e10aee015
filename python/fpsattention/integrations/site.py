"""One attention module under a schedule: what its core does in the forward at hand."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..layout.masks import BlockMask, Lists
from ..layout.plain import plain_tensors
from ..ops.attend import attend, attend_selected
from ..ops.checks import HEAD_DIMS, kernel_dim
from ..patterns import Clustered, clustered_attention
from . import padding
from .graph import Packed, dynamic
from .levels import Call, Part, index_of
from .prepared import WithoutNorms, raw_of, why_not
from .selection import Selector
from .state import CURRENT
from .token_order import moved

if TYPE_CHECKING:
    from .adapters import Preparation
    from .core_calls import CoreCall
    from .engine import Engine
    from .forward import Forward

#: Called with (layer name, q, k, v, output), all ``(B, S, H, D)``, q and k after RoPE, tokens in raster order.
Observer = Callable[[str, Tensor, Tensor, Tensor, Tensor], None]


class Site:
    """The attention of one layer.

    Args:
        owner: whose layer it is.
        name: path of the module, for messages.
        layer: its index.
        group: of layers that read the schedule alike.
        core: name of the function it calls.
        on_unsupported: ``"raise"`` or ``"dense"``.
    """

    def __init__(self, owner: Engine, name: str, layer: int, group: int, core: str, on_unsupported: str):
        self.owner = owner
        self.name = name
        self.layer = layer
        self.group = group
        self.core = core
        self.on_unsupported = on_unsupported
        self.observers: list[Observer] = []
        self.check: Observer | None = None  # sees the tensors of the graph themselves, in whatever order
        self.prepare: Preparation | None = None  # how norm and RoPE of q and k go to the quantizer
        self.prepare_strict = False  # an error where they cannot, whatever on_unsupported says of attention
        self.fallbacks: Counter[str] = Counter()
        self.kept: dict[
            str, Tensor
        ] = {}  # lists that compiled layers keep from step to step, of each level: read and written by graphs
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observers": [], "fallbacks": Counter(), "kept": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def bare(
        self, module: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """``module`` and the arguments of its code, by position (``names``) and by name, without norms and rotary tables where the
        quantizer of this forward does both; then ``CURRENT.raw`` says what q and k lack."""
        forward, compiling, preparation = CURRENT.forward, torch.compiler.is_compiling(), self.prepare
        CURRENT.raw = None
        unchanged = module, args, kwargs
        if preparation is None or self.owner.paused or forward is None or not forward.prepare:
            return unchanged
        if not compiling and (
            forward.owner is not self.owner or self.observers
        ):  # they see q and k as the model makes them
            return unchanged
        if not forward.prepare[self.group] or forward.refused is not None:
            return unchanged
        if not self.prepares(module, running=True):
            return unchanged
        place = names.index(preparation.argument)
        tables = args[place] if place < len(args) else kwargs.get(preparation.argument)
        CURRENT.raw = raw_of(preparation, module, args[0] if args else kwargs[names[0]], tables, forward)
        if place < len(args):
            args = (*args[:place], None, *args[place + 1 :])
        else:
            kwargs = {**kwargs, preparation.argument: None}
        return WithoutNorms(module), args, kwargs

    def prepares(self, module: Any, running: bool = False) -> bool:
        """Whether the norms of ``module`` are those of the quantizer, as its adapter has it; else an error, or a line in the report."""
        assert self.prepare is not None
        reason = why_not(self.prepare, module, running)
        if reason is not None:
            self._prepare_apart(reason)
        return reason is None

    def _prepare_apart(self, reason: str) -> None:
        if self.prepare_strict:
            raise UnsupportedError(f'fpsattention.apply: {self.name} {reason}: use apply(..., prepare="auto")')
        if not torch.compiler.is_compiling():
            with self._lock:
                self.fallbacks[f"norm and RoPE outside of the quantizer: {reason}"] += 1

    def reserve(self, level: str, size: int, device: torch.device) -> None:
        """A buffer of this size in :attr:`kept`, int32; one that is there keeps what it holds if it is of this size."""
        known = self.kept.get(level)
        if known is None or known.shape[0] != size or known.device != device:
            with plain_tensors():
                self.kept[level] = dynamic(torch.zeros(size, dtype=torch.int32, device=device))

    def attend(self, core: CoreCall) -> Tensor:
        """The output of the core, ``(B, S, H, D)``; of this rank's tokens, where they are spread over several."""
        if self.owner.paused or (core.causal and self.owner.causal_text):
            return core.dense(core.q, core.k, core.v)
        forward = CURRENT.forward
        if (
            forward is not None
            and (core.parallel is not None or forward.parallel is not None)
            and forward.refused is None
        ):
            from ..parallel import model as parallel

            return parallel.attend(self, core, forward)
        return self.attend_whole(core)

    def attend_whole(self, core: CoreCall) -> Tensor:
        """The output of a core that sees all tokens."""
        forward = CURRENT.forward
        own = forward  # compiled blocks of one code are not asked whose they are
        if not torch.compiler.is_compiling() and forward is not None and forward.owner is not self.owner:
            own = None
        reason = self.refusal(core)
        if reason is None and own is not None:
            reason = own.refused
        if reason is None and core.mask is not None:
            reason = padding.unexplained(core, self.owner.text_mask)
        if reason is not None:
            return self.refused(reason, lambda: _dense(core.finished(), own))
        if own is None:
            raise self._no_forward()
        if torch.compiler.is_compiling():
            calls = own.graph_calls or own.calls  # the latter where the hook did not see that this is compiled
            if not calls:
                raise UnsupportedError(
                    f"fpsattention.apply: {self.name}: the text length of this model shows at its attention only, expected it from the "
                    "arguments of the transformer: compiled attention cannot read it"
                )
            call = calls[self.group]
        elif self.owner.per_sample:
            call = self._call_of_sample(core, own)
        else:
            call = own.call(self.group, core.k.shape[1], core.q.device)
            own.executed[self.layer] += 1
        if core.k.shape[1] != call.slot_of_token.shape[0]:
            raise ConfigError(
                f"fpsattention.apply: {self.name} got {core.k.shape[1]} tokens, expected {call.slot_of_token.shape[0]}, as the "
                "arguments of its transformer's forward say"
            )
        out = self.parts(core, call)
        if self.check is not None and not torch.compiler.is_compiling():
            self.check(self.name, core.q, core.k, core.v, out)
        if self.observers and not torch.compiler.is_compiling():
            seen = (core.q, core.k, core.v, out)
            if own.order is not None:
                seen = tuple(moved(x, 1, own.order.to_raster) for x in seen)  # type: ignore[assignment]
            for observer in self.observers:
                observer(self.name, *seen)
        return out

    def _call_of_sample(self, core: CoreCall, forward: Forward) -> Call:
        """Of a model that hands its core one sample after the other, each with the tokens that it has."""
        sample = forward.next_sample(self.layer)
        t, h, w = (forward.tokens or forward.video).grid  # type: ignore[union-attr]
        text_len = core.q.shape[1] - t * h * w
        if text_len < 0 or core.q.shape[0] != 1:
            raise ConfigError(
                f"fpsattention.apply: {self.name} got q of shape {tuple(core.q.shape)}, expected one sample of at least {t * h * w} tokens"
            )
        if sample == 0:
            forward.executed[self.layer] += 1
            forward.tokens = (forward.tokens or forward.video)._replace(text_len=text_len)  # type: ignore[union-attr]
        return forward.call_of((sample,), text_len, self.group, core.q.device)

    def parts(self, core: CoreCall, call: Call, run: Callable[..., Tensor] | None = None) -> Tensor:
        """The launches of a call, put together in the order of the batch: each by ``run(core, part, q, k, v)``, which sees no masks, or as
        on whole sequences."""
        masked = None
        if core.mask is not None and not all(part.dense for part in call.parts):
            if core.raw is not None and self.prepare is not None and self.prepare.text_rotated:
                self._prepare_apart(
                    "got padded text, which it rotates, expected no mask: a key that stands for hidden ones would not stay one"
                )
                core = core.finished()
            forward = CURRENT.forward
            masked = padding.masked(core, call.text_first, None if forward is None else forward.order)
        run = run or (lambda *given: self.launch(call, *given)[0])
        if len(call.parts) == 1 and call.parts[0].keeps:
            kept = self._kept(call.parts[0])
            out, later = self._launch_kept(call, core, call.parts[0], core.q, core.k, core.v, kept, *(masked or ()))
            kept.copy_(later)
            return out
        if len(call.parts) == 1:
            return run(core, call.parts[0], core.q, core.k, core.v, *([masked] if masked else []))
        if call.parts[0].chosen is not None:
            return self._branches(core, call, masked)
        assert call.order is not None  # several parts: there is an order, and each names its samples
        outs = []
        for part in call.parts:
            assert part.samples is not None
            q, k, v = (x.index_select(0, part.samples) for x in (core.q, core.k, core.v))
            outs.append(run(core, part, q, k, v, *([masked.select(part.samples)] if masked else [])))
        return torch.cat(outs).index_select(0, call.order)

    def _launch_kept(
        self, call: Call, core: CoreCall, part: Part, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, *masked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`_launch_in_graph` whose lists stay for some steps: the output, and what their buffer, ``kept``, holds from now on."""
        select = part.select
        assert select is not None and select.fresh is not None

        def run(again: bool, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, *masked: Tensor) -> tuple[Tensor, Tensor]:
            known = select.unpack(kept, q.shape[0], q.shape[2]) if again else None
            out, lists = self._launch_in_graph(call, core, part, known, q, k, v, *masked)
            return out, kept.clone() if lists is None or again else select.pack(lists)

        return torch.cond(select.fresh, partial(run, False), partial(run, True), (q, k, v, kept, *masked))  # type: ignore[no-any-return]

    def _launch_in_graph(
        self, call: Call, core: CoreCall, part: Part, known: Lists | None, q: Tensor, k: Tensor, v: Tensor, *masked: Tensor
    ) -> tuple[Tensor, Lists | None]:  # fmt: skip
        """:meth:`launch` whose output is as any other branch gives it: contiguous, of the dtype of v."""
        out, lists = self.launch(call, core, part, q, k, v, padding.Masked(*masked) if masked else None, known)
        return out.to(v.dtype).flatten().view(q.shape), lists  # contiguous(), and by the book where a size is 1

    def launch(
        self,
        call: Call,
        core: CoreCall,
        part: Part,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masked: padding.Masked | None = None,
        known: Lists | None = None,
    ) -> tuple[Tensor, Lists | None]:
        """One launch: its output, and the lists that a graph made or was given (``known``). ``masked``: what stands for k and v in FP8, and
        their mask, where there is one.

        Autocast leaves q and k in FP32 beside a 16-bit v, and the kernels want one 16-bit dtype on a GPU: everything goes to e4m3
        next, so the cast costs nothing that counts.
        """
        raw = None if core.raw is None else core.raw.select(part.samples)
        if part.dense:
            q, k = (q, k) if raw is None else raw.finish(q, k)
            return (core.dense(q, k, v) if masked is None else core.dense(q, k, v, masked.mask)), None
        if self.owner.causal_text and q.shape[1] != k.shape[1]:
            square, made_of = self.launch(call, core, part, *_square(q, k, v), masked, known)
            return square[:, : q.shape[1]], made_of
        hidden = None
        if masked is not None:
            k, v, hidden, _ = masked
            if part.precision != "fp8":
                raise UnsupportedError(
                    f"fpsattention.apply: {self.name} got an attention mask at a level of precision {part.precision}, expected fp8"
                )
        if raw is not None and (
            part.precision != "fp8" or part.lists is None or part.hadamard or q.shape != k.shape
        ):  # such a level, beside others; or a model with fewer heads of K
            q, k, raw = *raw.finish(q, k), None
        dtype = v.dtype
        if dtype == torch.float32 and v.device.type != "cpu":
            dtype = torch.bfloat16
        if q.dtype != dtype or k.dtype != dtype or v.dtype != dtype:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        options: dict[str, Any] = {
            "granularity": part.granularity, "precision": part.precision, "scale": core.scale, "hadamard": part.hadamard,
            "smooth_k": part.precision != "paper",
        }  # fmt: skip
        lists = known or part.lists
        if isinstance(lists, Packed):
            lists = lists.unpack(q.shape[0], core.num_heads or q.shape[2])
        if lists is None:  # made here, of the heads at hand
            assert part.select is not None
            heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            if torch.compiler.is_compiling() and part.select.pools:
                return attend_selected(q, k, v, part.select.selection(), hidden=hidden, **options)[:2]
            if torch.compiler.is_compiling():
                lists = part.select.traced(*heads_first)
            else:
                made, out = self._made(
                    call, part.select, *heads_first,
                    lambda selection: attend_selected(q, k, v, selection, hidden=hidden, **options),
                )  # fmt: skip
                if out is not None:
                    return out, None
                if isinstance(made, Clustered):
                    if hidden is not None:
                        raise UnsupportedError(
                            f"fpsattention.apply: {self.name} got an attention mask under a pattern that permutes, expected None"
                        )
                    return clustered_attention(*heads_first, made, **options).transpose(1, 2), None
                lists = made if isinstance(made, Lists) else made.lists(torch.is_grad_enabled())
        elif core.heads is not None and lists.kv_num_blocks.shape[1] > 1:
            index = index_of(core.heads, q.device)
            lists = Lists(*lists[:3], *(x if x is None else x.index_select(1, index) for x in lists[3:]))  # type: ignore[arg-type]
        if raw is not None:
            options |= {"norm": raw.norm(q.shape[1]), "rope": raw.rope(q.shape[1])}
            if not torch.compiler.is_compiling() and CURRENT.forward is not None:
                prepared = CURRENT.forward.prepared
                prepared[self.layer] = prepared.get(self.layer, 0) + q.shape[0]
        tables = lists if part.groups is None else part.groups.of(lists)
        return attend(q, k, v, tables, hidden=hidden, **options)[0], lists

    def _kept(self, part: Part) -> Tensor:
        """The buffer that the lists of a part stay in."""
        assert part.select is not None
        return self.kept[part.select.level]

    def _made(self, call: Call, select: Selector, *given: Any) -> tuple[BlockMask | Clustered | Lists, Tensor | None]:
        forward = CURRENT.forward
        assert forward is not None
        return self.owner.selections.make(self.layer, call.samples, select, forward.step, *given)

    def _branches(self, core: CoreCall, call: Call, masked: padding.Masked | None) -> Tensor:
        """Every launch that some sample wants, by branches of the graph; each sample takes the output of its own."""
        out: Tensor | None = None
        for part in call.parts:
            assert part.chosen is not None and part.wanted is not None
            kept = [self._kept(part)] if part.keeps else []

            def run(q: Tensor, k: Tensor, v: Tensor, *others: Tensor, part: Part = part) -> tuple[Tensor, ...]:
                if part.keeps:
                    return self._launch_kept(call, core, part, q, k, v, *others)
                return self._launch_in_graph(call, core, part, None, q, k, v, *others)[:1]

            def skip(q: Tensor, k: Tensor, v: Tensor, *others: Tensor, part: Part = part) -> tuple[Tensor, ...]:
                out = q.new_zeros(q.shape, dtype=v.dtype)
                return (out, others[0].clone()) if part.keeps else (out,)

            operands = (core.q, core.k, core.v, *kept, *(masked or ()))
            one, *later = torch.cond(part.wanted, run, skip, operands)
            if part.keeps:
                kept[0].copy_(later[0])
            out = one if out is None else torch.where(part.chosen.view(-1, 1, 1, 1), one, out)
        assert out is not None
        return out

    def refusal(self, core: CoreCall) -> str | None:
        """Why this call must be the model's own, or None."""
        if core.causal:
            return "is causal, expected attention in both directions"
        if core.parallel is not None:
            return "runs under context parallelism, expected whole sequences (no _parallel_config)"
        (batch, count, heads, dim), of_keys = core.q.shape, core.k.shape
        fewer = of_keys[2] and heads % of_keys[2] == 0  # grouped queries
        if self.owner.causal_text:  # the tables say how many
            count = max(count, of_keys[1])
        if of_keys != (batch, count, of_keys[2], dim) or core.v.shape != of_keys or not fewer:
            shapes = ", ".join(str(tuple(x.shape)) for x in (core.q, core.k, core.v))
            return f"got q, k, v of shapes {shapes}, expected equal ones, heads of k and v aside (only self-attention is replaced)"
        if kernel_dim(core.q.shape[3]) is None:
            return f"has head dimension {core.q.shape[3]}, expected at most {HEAD_DIMS[-1]}"
        if core.dropout:
            return f"has dropout {core.dropout}, expected 0"
        return None

    def refused(self, reason: str, dense: Callable[[], Tensor]) -> Tensor:
        """What a call that cannot be served gives: an error, or the model's own attention and a line in the report.

        Raises:
            UnsupportedError: with ``on_unsupported="raise"``.
        """
        if self.on_unsupported == "raise":
            raise UnsupportedError(
                f'fpsattention.apply: {self.name} {reason}: call remove(), or apply(..., on_unsupported="dense")'
            )
        if not torch.compiler.is_compiling():
            with self._lock:
                self.fallbacks[reason] += 1
        return dense()

    def _no_forward(self) -> ConfigError:
        return ConfigError(
            f"fpsattention.apply: {self.name} ran outside of a forward of its transformer, where the grid and sigma are read: call "
            "transformer(...), not transformer.forward(...); checkpoint blocks through "
            "transformer.enable_gradient_checkpointing(your_function) or torch's checkpoint_wrapper, not by hand"
        )


def _square(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``(B, S, H, D)`` in the order of the tables, which have the first keys last: those without queries get empty ones, whose
    rows visit nothing."""
    alone = k.shape[1] - q.shape[1]
    empty = q.new_zeros(q.shape[0], alone, q.shape[2], q.shape[3])
    return torch.cat([q, empty], 1), k.roll(-alone, 1), v.roll(-alone, 1)


def _dense(core: CoreCall, forward: Forward | None) -> Tensor:
    """The model's own call; a mask is in raster order."""
    if forward is None or forward.order is None:
        return core.dense(core.q, core.k, core.v)
    to_tile, to_raster = forward.order
    return moved(core.dense(*(moved(x, 1, to_raster) for x in (core.q, core.k, core.v))), 1, to_tile)
