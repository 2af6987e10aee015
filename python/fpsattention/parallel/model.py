"""``fpsattention.parallel.shard``: a transformer whose tokens are spread over ranks, and what its attention does then."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..integrations.diffusers import _transformers
from ..integrations.state import CURRENT
from ..layout.masks import Lists
from .attention import EXCHANGES, OUTPUTS, SCHEMES, deal, quantized
from .collectives import agree, all_gather, group_of
from .heads import Heads
from .plans import MODULATION, PER_TOKEN, PLANS, REFUSED, Plan, Stack, class_name
from .sharding import Sharding, shard_tokens
from .ulysses import to_heads, to_tokens

if TYPE_CHECKING:
    from ..integrations.core_calls import CoreCall
    from ..integrations.forward import Forward
    from ..integrations.levels import Call, Part
    from ..integrations.site import Site

# Sizes differ by rank and shards are made once per forward, so exchanges stay out of graphs: compiled blocks break where tokens are cut and at their
# attention, and are graphs in between.
_eager = torch.compiler.disable(
    reason="fpsattention.parallel exchanges tokens outside of graphs: leave out fullgraph=True"
)


@dataclass(eq=False)
class ForwardShard:
    """How one forward is spread: known when its tokens are.

    Attributes:
        streams: how ranges are cut: "apart" or "joint", as :func:`shard_tokens` has it.
        modulated: modulation per token was cut, so the output is put together after the last block.
        tile_order: one process would have the video's tokens in tile order (``apply(token_order=...)``).
        replicated: text tokens that every rank holds beside its own video; the ranks whose tiles they are attend for them.
    """

    group: dist.ProcessGroup
    scheme: str = "ulysses"
    exchange: str = "bf16"
    output: str = "bf16"
    streams: str = "apart"
    sharding: Sharding | None = None
    modulated: bool = False
    replicated: int = 0
    agreed: bool = False
    tile_order: bool = False
    heads: dict[int, Heads] = field(default_factory=dict)  # by group of layers

    def of(self, forward: Forward) -> Sharding:
        """The sharding of the tokens of ``forward``."""
        if self.sharding is None:
            assert forward.tokens is not None
            layout = forward.owner.tables.tables(forward.tokens).layout
            self.sharding = shard_tokens(layout, self.group, whole_tiles=self.exchange == "fp8", streams=self.streams)
        return self.sharding


class ShardedModel:
    """What :func:`shard` returns: hooks on a transformer; :meth:`remove` takes them off."""

    def __init__(self, transformer: Any, plan: Plan, group: dist.ProcessGroup, scheme: str, exchange: str, output: str):
        self.group, self.scheme, self.exchange, self.output, self.plan = group, scheme, exchange, output, plan
        self._hooks = [transformer.register_forward_pre_hook(self._begin)]
        last: Any = None
        for stack in plan.stacks:
            for i, block in enumerate(transformer.get_submodule(stack.blocks)):
                names = tuple(inspect.signature(type(block).forward).parameters)[1:]
                hook = partial(self._cut, stack, i == 0, names)
                self._hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                last = block
        self._hooks.append(last.register_forward_hook(partial(self._join, False)))
        if plan.output:
            self._hooks.append(transformer.get_submodule(plan.output).register_forward_hook(partial(self._join, True)))

    def __deepcopy__(self, memo: Any) -> ShardedModel:
        return self  # a copied model (EMA, teacher) is spread over the same ranks; a process group cannot be copied

    def remove(self) -> None:
        """The transformer is whole again. Calling it twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @_eager
    def _begin(self, transformer: Any, args: Any) -> None:
        from ..integrations.installation import installation_of

        if installation_of(transformer) is None:
            raise ConfigError(
                "fpsattention.parallel.shard: no schedule is applied, and the model's own attention knows only the tokens of one rank: call "
                "fpsattention.apply(model, schedule) too"
            )

    def new_forward(self) -> ForwardShard:
        """For a forward that begins."""
        return ForwardShard(self.group, self.scheme, self.exchange, self.output)

    @_eager
    def _cut(
        self, stack: Stack, first: bool, names: tuple[str, ...], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
        forward, state = _running()
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if arguments.get("token_replace_emb") is not None or arguments.get("controlnet_residual") is not None:
            raise UnsupportedError(
                "fpsattention.parallel.shard: token_replace_emb (image to video by token replacement) or controlnet_residual was given, "
                "expected None: they are of whole frames"
            )
        text = arguments.get("encoder_hidden_states") if stack.text and first else None
        if forward.tokens is None and forward.video is not None:
            forward.tokens = forward.video._replace(text_len=0 if text is None else text.shape[1])
        sharding, changed = state.of(forward), {}
        # A text is a tile or two: whole ones would leave ranks without any.
        if text is not None and not sharding.whole_tiles:
            changed["encoder_hidden_states"] = sharding.take(text, 1, "text")
        elif text is not None:
            state.replicated = text.shape[1]
        for name in (*(stack.entry if first else ()), *stack.every):
            changed[name] = sharding.take(arguments[name], 1, "video")
        count = sharding.layout.num_video_tokens
        for name in PER_TOKEN:
            if arguments.get(name) is not None:
                changed[name] = _rows(arguments[name], count, sharding)
                state.modulated |= name in MODULATION and changed[name] is not arguments[name]
        return tuple(changed.pop(n, a) for n, a in zip(names, args, strict=False)) + args[len(names) :], {
            **kwargs,
            **changed,
        }

    @_eager
    def _join(self, at_output: bool, module: Any, args: Any, output: Any) -> Any:
        forward, state = _running()
        here = self.plan.output != "" and not state.modulated
        if here != at_output:
            return None
        video = output[0] if isinstance(output, tuple) else output
        whole = state.of(forward).gather(video, 1, "video")
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _running() -> tuple[Forward, ForwardShard]:
    forward = CURRENT.forward
    if forward is None or forward.parallel is None:
        raise ConfigError(
            "fpsattention.parallel.shard: a block ran outside of a forward of its transformer, expected transformer(...): the tokens are read there"
        )
    if forward.refused is not None:
        raise UnsupportedError(
            f"fpsattention.parallel.shard: {forward.refused}: the tokens of this forward are not known"
        )
    return forward, forward.parallel


def _rows(x: Any, count: int, sharding: Sharding) -> Any:
    """The rows of this rank of a tensor, or of several, whose first dimension of size ``count`` is the video's; the last one of floats
    holds features."""
    if isinstance(x, (tuple, list)):
        return type(x)(_rows(part, count, sharding) for part in x)
    if not isinstance(x, Tensor) or count == 1:
        return x
    sizes = list(x.shape[:-1] if x.is_floating_point() and x.ndim > 1 else x.shape)
    return sharding.take(x, sizes.index(count), "video") if count in sizes else x


def shard(
    model: Any, mesh: Any = None, *, scheme: str = "ulysses", exchange: str = "fp8", output: str = "bf16"
) -> list[ShardedModel]:
    """Spread the tokens of a transformer (or of those of a pipeline) over the ranks of ``mesh``, for inference and training.

    Every rank calls the model with the same whole inputs and gets the same whole output. In between, from the entry of the first block to the output
    projection, a rank works on its own tokens only; :func:`fpsattention.apply` must be on the model, before or after, and its attention exchanges what it
    needs. Levels of the model's own attention ("bf16"), padded texts and refusals always go by Ulysses in the dtype of the model.

    Args:
        mesh: a 1-D DeviceMesh or a ProcessGroup; None: all processes.
        scheme, exchange, output: as in :func:`attention`. With "bf16" tokens are cut into ranges, else into whole tiles.

    Gradients: every rank computes the same loss from the whole output; a parameter's gradient is then the mean over the ranks, which DDP and
    FSDP over all processes take anyway.

    Returns:
        One :class:`ShardedModel` per transformer, with ``remove()``.

    Raises:
        ConfigError: an argument is wrong, or the model is spread already. UnsupportedError: this model cannot be cut.
    """
    for name, value, known in (
        ("scheme", scheme, SCHEMES),
        ("exchange", exchange, EXCHANGES),
        ("output", output, OUTPUTS),
    ):
        if not isinstance(value, str) or value not in known:
            raise ConfigError(
                f"fpsattention.parallel.shard: {name} {value!r}, expected one of {', '.join(map(repr, known))}"
            )
    if exchange == "bf16" and (scheme != "ulysses" or output != "bf16"):
        raise ConfigError(
            f"fpsattention.parallel.shard: exchange 'bf16' with scheme {scheme!r} and output {output!r}, expected 'ulysses' and 'bf16'"
        )
    if output == "fp8" and scheme != "ulysses":
        raise ConfigError(f"fpsattention.parallel.shard: output 'fp8' with scheme {scheme!r}, expected 'ulysses'")
    group = group_of(mesh, "parallel.shard")
    found = _transformers(model, "parallel.shard")
    for name, transformer in found.items():
        if sharded(transformer) is not None:
            raise ConfigError(
                f"fpsattention.parallel.shard: {name} is spread already, expected one that is not: call remove() first"
            )
        if getattr(transformer, "_parallel_config", None) is not None:
            raise ConfigError(
                f"fpsattention.parallel.shard: enable_parallelism() was called on {name}, expected one of the two: it works with apply() as it is"
            )
        if class_name(transformer, PLANS) is None:
            refused = class_name(transformer, REFUSED)
            reason = REFUSED[refused] if refused else f"expected one of {', '.join(PLANS)}"
            raise UnsupportedError(f"fpsattention.parallel.shard: {type(transformer).__name__} has no plan: {reason}")
    plans = {name: PLANS[class_name(part, PLANS) or ""] for name, part in found.items()}
    return [ShardedModel(part, plans[name], group, scheme, exchange, output) for name, part in found.items()]


def sharded(transformer: Any) -> ShardedModel | None:
    """The :class:`ShardedModel` of a transformer, found through its hook."""
    for hook in getattr(transformer, "_forward_pre_hooks", {}).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, ShardedModel):
            return owner
    return None


# Attention -------------------------------------------------------------------------------------------------------------------


@_eager
def attend(site: Site, core: CoreCall, forward: Forward) -> Tensor:
    """The output of a core that sees the tokens of this rank, ``(B, S_local, H, D)``."""
    state = forward.parallel or _of_diffusers(core, forward)
    if state is None or forward.owner is not site.owner or site.owner.causal_text:
        return site.attend_whole(core)  # which refuses
    if forward.owner.recorder is not None:
        raise UnsupportedError("fpsattention.parallel: a recording is on, expected none: record on one process")
    if forward.tokens is None:
        counts = all_gather(torch.tensor([core.q.shape[1]], device=core.q.device), state.group, "agreement")
        forward._close(sum(int(count) for count in counts))
    assert forward.tokens is not None
    sharding = state.of(forward)
    if state.replicated:
        return _with_whole_text(site, core, forward, state, sharding)
    return _attend(site, core, forward, state, sharding)


def _with_whole_text(site: Site, core: CoreCall, forward: Forward, state: ForwardShard, sharding: Sharding) -> Tensor:
    """Of q, k and v that hold the whole text, beside this rank's video: text that is another rank's is left out, and its output fetched."""
    count, prefix = state.replicated, sharding.layout.text_position == "prefix"
    video = core.q.shape[1] - count
    index = sharding.local_tokens("text", core.q.device)

    def own(x: Tensor) -> Tensor:
        text, rest = (x[:, :count], x[:, count:]) if prefix else (x[:, video:], x[:, :video])
        text = text.index_select(1, index)
        return torch.cat([text, rest] if prefix else [rest, text], dim=1)

    out = _attend(site, replace(core, q=own(core.q), k=own(core.k), v=own(core.v)), forward, state, sharding)
    mine = index.numel()
    text, rest = (out[:, :mine], out[:, mine:]) if prefix else (out[:, video:], out[:, :video])
    text = sharding.gather(text, 1, "text")
    return torch.cat([text, rest] if prefix else [rest, text], dim=1)


def _attend(site: Site, core: CoreCall, forward: Forward, state: ForwardShard, sharding: Sharding) -> Tensor:
    assert forward.tokens is not None
    if core.q.shape[1] != sharding.num_local:
        raise ConfigError(
            f"fpsattention.parallel: {site.name} got {core.q.shape[1]} tokens on rank {sharding.rank}, expected {sharding.num_local}: "
            f"the model was cut otherwise than {sharding.describe()}"
        )
    if core.k.shape != core.q.shape:
        raise UnsupportedError(
            f"fpsattention.parallel: {site.name} got k of shape {tuple(core.k.shape)}, expected {tuple(core.q.shape)} as q: heads that share "
            "keys are not dealt to ranks"
        )
    if not state.agreed:
        known = "" if isinstance(forward.segments, Tensor) else f" segments {tuple(forward.segments)}"
        known += f" schedule {zlib.crc32(repr(forward.owner.tables.schedule).encode()):08x}"
        shape = (core.q.shape[0], *core.q.shape[2:])
        agree(
            f"{state.scheme}/{state.exchange}/{state.output} {sharding.describe()} B,H,D {shape} {core.q.dtype} grad={forward.backward}{known}",
            sharding.group, core.q.device,
        )  # fmt: skip
        state.agreed = True
        state.tile_order = bool(forward.owner.places) and forward.owner.tables.all_fp8(forward.segments)
    heads = _heads(site, core, forward, state, sharding)
    if core.parallel is not None:  # what runs on whole sequences is the model's own attention of one process
        core = replace(core, parallel=None, dense=partial(core.dense, parallel_config=None))
    if state.exchange == "fp8" and core.mask is None and site.refusal(core) is None and not site.owner.per_sample:
        call = forward.call(site.group, forward.tokens.video_tokens + forward.tokens.text_len, core.q.device)
        forward.executed[site.layer] += 1
        return site.parts(core, call, partial(_part, site, state, sharding, heads, call))
    return _whole(core, sharding, heads, site.attend_whole)


def _whole(core: CoreCall, sharding: Sharding, heads: Heads, run: Any) -> Tensor:
    """``run`` on all tokens of this rank's heads; a mask over this rank's keys becomes one over all."""
    mask = core.mask
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == 1 and mask.shape[3] == sharding.num_local:
        core = replace(core, mask=sharding.gather(mask, 3))
    q, k, v = to_heads(core.q, core.k, core.v, sharding, heads)
    if q.shape[2]:
        out = run(replace(core, q=q, k=k, v=v, heads=heads.of[sharding.rank], num_heads=heads.total))
    else:
        out = q + k + v  # more ranks than heads: empty, but gradients travel back
    return to_tokens(out, sharding, heads)


def _part(
    site: Site,
    state: ForwardShard,
    sharding: Sharding,
    heads: Heads,
    call: Call,
    core: CoreCall,
    part: Part,
    *qkv: Tensor,
) -> Tensor:
    """One launch, as ``site.launch`` makes it on whole sequences."""
    q, k, v = qkv
    if part.select is not None or part.precision != "fp8" or part.groups is not None:
        # Patterns read all of q and k, unquantized, INT8 and the paper's P have no exchange, and scale groups of several tiles may be of several
        # ranks: whole sequences of this rank's heads.
        return _whole(
            replace(core, q=q, k=k, v=v), sharding, heads,
            lambda whole: site.launch(call, whole, part, whole.q, whole.k, whole.v)[0],
        )  # fmt: skip
    if part.lists is None:
        return _whole(
            replace(core, q=q, k=k, v=v), sharding, heads, lambda whole: whole.dense(whole.q, whole.k, whole.v)
        )
    assert isinstance(part.lists, Lists)  # packed ones are for compiled layers
    dtype = v.dtype
    if dtype == torch.float32 and v.device.type != "cpu":
        dtype = torch.bfloat16
    out, _ = quantized(
        q.to(dtype), k.to(dtype), v.to(dtype), sharding, heads, part.lists, scheme=state.scheme, output=state.output,
        granularity=part.granularity, scale=core.scale, smooth_k=True, pow2_scales=False, deterministic=False, backend="auto",
        tile_order=state.tile_order, hadamard=part.hadamard,
    )  # fmt: skip
    return out


def _heads(site: Site, core: CoreCall, forward: Forward, state: ForwardShard, sharding: Sharding) -> Heads:
    """Heads of the ranks, by the lists of the layer's group where they are known before the exchange. Once per forward."""
    if site.group not in state.heads:
        lists = None
        if not site.owner.per_sample and forward.tokens is not None:
            call = forward.call(site.group, sharding.layout.num_tokens, core.q.device)
            lists = next((part.lists for part in call.parts if isinstance(part.lists, Lists)), None)
        state.heads[site.group] = deal(core.q.shape[2], sharding, lists)
    return state.heads[site.group]


def _of_diffusers(core: CoreCall, forward: Forward) -> ForwardShard | None:
    """``enable_parallelism()``: ranges of tokens, each stream cut on its own; ring degrees are served by Ulysses, too."""
    config = getattr(core.parallel, "context_parallel_config", None)
    if config is None:
        return None
    cut: Sequence[str] = tuple(getattr(forward.owner.transformer, "_cp_plan", None) or ())
    joint = any(
        ".attn" in module for module in cut
    )  # the sequence is cut where attention begins, not before its streams join
    forward.parallel = ForwardShard(config._flattened_mesh.get_group(), streams="joint" if joint else "apart")
    return forward.parallel
