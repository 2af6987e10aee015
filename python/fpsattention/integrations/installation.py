"""One transformer under a schedule: its swapped processors, its forward hooks, its counters."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..ops.checks import HEAD_DIMS, kernel_dim
from ..schedule import Schedule
from .adapters import ADAPTERS, Adapter, Geometry, refusal
from .checkpointing import plain_checkpoints, snapshot_checkpoints
from .cores import core_of, installed, restore, swap
from .engine import Engine
from .forward import Forward
from .levels import LevelTables
from .linears import Linears
from .prepared import MODES, head_dim_of, why_not
from .selection import Selector, Step
from .sigmas import SchedulerOf, SigmaReader
from .state import CURRENT
from .token_order import Order
from .token_order import install as token_order_hooks
from .tokens import Tokens


class Installation(Engine):
    """Stand-ins for the processors of a transformer, and hooks that tell them, once per forward, what to do.

    Args:
        adapter: what is known of the model.
        name: of the transformer in its pipeline, for messages and reports.
        scheduler: returns the pipeline's scheduler, or None.
        exact: frames that are dense in both directions, besides those of the adapter; negative ones count from the end.

    Attributes:
        copied: it came along with a copied or unpickled model, and no handle owns it.
        paused: forwards run the model's own attention, uncounted (``Handle.disabled``).
    """

    def __init__(
        self,
        transformer: Any,
        adapter: Adapter,
        schedule: Schedule,
        name: str,
        scheduler: SchedulerOf,
        num_train_timesteps: int,
        on_unsupported: str,
        debug: bool,
        token_order: str | None = None,
        exact: tuple[int, ...] = (),
        prepare: bool | str = False,
    ):
        attentions = adapter.attentions(transformer)
        heads = _num_heads(attentions)
        schedule.check_model(adapter.class_name(transformer), len(attentions), heads)
        cores = [core_of(module, adapter.core) for module in attentions.values()]
        super().__init__(
            name, schedule, list(attentions), heads, cores, on_unsupported, adapter.per_sample, adapter.text_mask,
            adapter.causal_text,
        )  # fmt: skip
        self.transformer = transformer
        self.adapter = adapter
        self.copied = False
        self.exact = exact
        self.reader = SigmaReader(scheduler, num_train_timesteps, adapter)
        self._arguments = tuple(inspect.signature(type(transformer).forward).parameters)[1:]
        self._warned_replaced = False
        self._blocks = _containers(transformer, attentions)
        self.modules: list[Any] = list(attentions.values())
        self.linears = Linears(self, _layers_with_linears(self.tables, list(attentions)))
        self._prepare(prepare)
        order_hooks = token_order_hooks(self, token_order)
        if debug:
            for site in self.sites:
                site.check = self._check_finite
        self._stand_ins = [swap(module, site) for module, site in zip(self.modules, self.sites, strict=True)]
        self.places = len(order_hooks)
        self._hooks = [
            *order_hooks,
            transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            transformer.register_forward_hook(self._after_forward, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "recorder": None, "copied": True, "paused": False}

    def reset(self) -> None:
        """Forget all counts."""
        super().reset()
        self.reader.host_reads = 0

    def remove(self) -> None:
        """Put the original processors back; an attention whose processor somebody else replaced since is left alone."""
        for hook in self._hooks:
            hook.remove()
        for module, stand_in in zip(self.modules, self._stand_ins, strict=True):
            if installed(module) is stand_in:
                restore(module)
        self.linears.remove()
        plain_checkpoints(self.transformer)
        self.selections.clear()

    def _prepare(self, mode: bool | str) -> None:
        """Let the sites run norm and RoPE in the quantizer, where their models are known to allow it."""
        if mode not in MODES:
            raise ConfigError(f"fpsattention.apply: prepare {mode!r}, expected one of {MODES}")
        preparation = self.adapter.prepare
        strict = mode is True and self.on_unsupported == "raise"
        if mode is True and isinstance(preparation, str):
            raise UnsupportedError(
                f"fpsattention.apply: prepare: norms and RoPE of {self.adapter.name} {preparation}, expected a family whose adapter says how "
                "(fpsattn models): leave prepare out"
            )
        if mode is not False and isinstance(preparation, str):
            self.own_norms = f"norm and RoPE outside of the quantizer: those of {self.adapter.name} {preparation}"
        if mode is False or isinstance(preparation, str):
            return
        for site, module in zip(self.sites, self.modules, strict=True):
            if strict and (reason := why_not(preparation, module)) is not None:
                raise UnsupportedError(f'fpsattention.apply: {site.name} {reason}: use apply(..., prepare="auto")')
            site.prepare, site.prepare_strict = preparation, strict

    @property
    def _prepares(self) -> bool:
        return self.sites[0].prepare is not None

    def _norms_in_graphs(self, wanted: tuple[bool, ...]) -> None:
        """Which layers run norm and RoPE in the quantizer: compiled code counts nothing, so it is asked here what the code finds."""
        pairs = [(site, module) for site, module in zip(self.sites, self.modules, strict=True) if wanted[site.group]]
        self.prepared_in_graphs = frozenset(site.layer for site, module in pairs if site.prepares(module))

    # Every forward ---------------------------------------------------------------------------------------------------------

    def _before_forward(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads grid and sigma from the arguments of the transformer and leaves its layers their calls."""
        if self.paused:
            return
        if torch.compiler.is_compiling():
            self._trace_forward(transformer, args, kwargs)
        else:  # asked here: the functions below run with Dynamo off
            callback = torch._C._dynamo.eval_frame.get_eval_frame_callback()
            self._begin_forward(transformer, args, kwargs, compiled=callback is not None and callback is not False)

    @contextmanager
    def forward_of(self, arguments: dict[str, Any]) -> Iterator[None]:
        """What runs inside is a forward of the transformer with these arguments, by name."""
        self._begin_forward(self.transformer, (), arguments, compiled=False)
        try:
            yield
        finally:
            self._after_forward(self.transformer, (), None)

    def _geometry(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Geometry:
        arguments = dict(zip(self._arguments, args, strict=False))
        arguments.update(kwargs)
        return self.adapter.geometry(transformer, arguments)

    def _begin_forward(
        self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> None:
        """``compiled``: what runs under this hook is compiled (``torch.compile(transformer)``)."""
        try:
            if getattr(transformer, "_is_parallelized", False):  # since
                raise UnsupportedError(
                    f"fpsattention.apply: {self.name}: {parallelized(transformer)}, expected it whole"
                )
            geometry = self._geometry(transformer, args, kwargs)
            self._check_exact(geometry)
        except UnsupportedError as error:
            if self.on_unsupported == "raise":
                raise
            CURRENT.forward = Forward(
                self, None, (), torch.device("cpu"), False, before=CURRENT.forward, refused=str(error)
            )
            return
        timestep = self.reader.per_sample(geometry.timestep, geometry.latents.shape[0])
        t, h, w = geometry.grid
        grid, exact = (int(t), int(h), int(w)), self._exact(geometry)
        tokens = Tokens(grid, geometry.text_len or 0, geometry.text_position, exact, alone=geometry.alone)
        device = geometry.latents.device
        backward = torch.is_grad_enabled()
        segments: Tensor | tuple[int, ...]
        schedule, edges = self.tables.schedule, self.tables.edges
        if schedule.axis == "steps" and edges and (sigmas_of_run := self.reader.trajectory(timestep)) is not None:
            edges = schedule.edges_of(sigmas_of_run)
        run = self.reader.run(timestep) if self.tables.needs_steps else None
        if self.tables.needs_host or self.recorder is not None or run is not None:
            sigmas = self.reader.on_host(timestep)
            if self.recorder is not None:
                self.recorder.begin(self.name, sigmas, tokens.grid, tokens.text_position, tokens.exact)
        if self.tables.needs_host:
            segments = tuple(schedule.segment(sigma, edges) for sigma in sigmas)
        else:
            segments = self.tables.segments_on_device(self.reader.on_device(timestep).to(device), edges)
        spread = _spread(transformer)
        whole = spread is None and getattr(transformer, "_parallel_config", None) is None  # on this rank
        if self.places and whole and self.tables.all_fp8(segments):
            tokens = tokens._replace(order="tile")
        before = CURRENT.forward
        while before is not None and before.owner is self:  # of a forward that was interrupted
            before = before.before
        forward = Forward(self, tokens, segments, device, backward, executed=[0] * len(self.sites), before=before)
        forward.parallel = spread
        if tokens.order == "tile":
            forward.order = Order(*self.tables.order_on(tokens, device))
        self.linears.refresh()
        if self.linears.installed:
            forward.linears = self.tables.linears(segments, device)
        forward.step = None if run is None else (run, tuple(sigmas))
        in_graphs = whole and (compiled or self.compiled_modules())  # of several ranks, attention stays eager
        if whole and self._prepares:
            forward.prepare = self.tables.prepares(None if in_graphs else segments)
            forward.text_first = geometry.text_position == "prefix"
        if in_graphs:
            reason = self.tables.eager_only()
            forward.refused = None if reason is None else self._refused_compiled(reason)
        if geometry.text_len is None:
            forward.tokens, forward.video = None, tokens
            if in_graphs:
                forward.refused = self._refused_compiled("the text length of this model shows at its attention only")
        elif in_graphs:
            rows = (tokens, device, geometry.latents.shape[0])
            due = None if run is None else partial(self._due, forward.step, rows)
            forward.graph_calls = self.tables.graph_calls(tokens, device, segments, backward, due)
            if forward.prepare and forward.refused is None:
                self._norms_in_graphs(forward.prepare)
        else:
            forward.calls = self.tables.calls(tokens, device, segments, backward)
        CURRENT.forward = forward
        if backward:
            snapshot_checkpoints(transformer, self._paths())
        self._notice_replaced()

    def _due(
        self, step: Step, of: tuple[Tokens, torch.device, int], group: int, select: Selector, wanted: bool
    ) -> bool | None:
        """Whether compiled layers of a group make their lists at a step; gives them the buffers that hold these until they are due. None: the
        buffers are another thread's, so lists are made every time."""
        if not self.selections.owned():
            return None
        size = select.kept_size(of[2] * (self.tables.num_heads or 0))
        for site in self.sites:
            if site.group == group:
                site.reserve(select.level, size, of[1])
        return wanted and self.selections.due((group, select.level), of, select.refresh, step)

    def _exact(self, geometry: Geometry) -> tuple[int, ...]:
        if not geometry.exact and not self.exact:
            return ()
        frames = int(geometry.grid[0])
        return tuple(sorted({*geometry.exact, *(frame + frames if frame < 0 else frame for frame in self.exact)}))

    def _check_exact(self, geometry: Geometry) -> None:
        if self._exact(geometry) and (pattern := self.tables.permuting()) is not None:
            raise UnsupportedError(
                f"fpsattention.apply: {self.name} has frames that are exact under {pattern}, which permutes tokens, expected another pattern"
            )

    def _refused_compiled(self, reason: str) -> str:
        """Compiled attention counts nothing, so what it refuses is counted here, per forward."""
        reason = f"is compiled, and {reason}, expected this model eager"
        if self.on_unsupported == "raise":
            raise UnsupportedError(f'fpsattention.apply: {self.name} {reason}, or apply(..., on_unsupported="dense")')
        with self._lock:
            for site in self.sites:
                site.fallbacks[reason] += 1
        return reason

    def _trace_forward(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook inside a graph that is being traced: nothing is counted, nothing is read from the device."""
        geometry = self._geometry(transformer, args, kwargs)
        timestep = self.reader.per_sample(geometry.timestep, geometry.latents.shape[0])
        if geometry.text_len is None:
            raise UnsupportedError(
                f"fpsattention.apply: {self.name}: the text length of this model shows at its attention only, expected it from the "
                "arguments: compile the blocks (compile_repeated_blocks), not the whole model"
            )
        t, h, w = (_constant(size) for size in geometry.grid)
        text_len, alone = _constant(geometry.text_len), _constant(geometry.alone)
        tokens = Tokens((t, h, w), text_len, geometry.text_position, self._exact(geometry), alone=alone)
        if (reason := self.tables.eager_only()) is not None:
            raise UnsupportedError(
                f"fpsattention.apply: {self.name} is compiled, and {reason}, expected this model eager"
            )
        if (level := self.tables.refreshed) is not None:
            raise UnsupportedError(
                f"fpsattention.apply: {self.name}: level {level.name!r} keeps a mask for {level.refresh} steps, which are counted by hooks that "
                "this graph holds, expected them outside: compile the transformer itself (torch.compile(transformer), compile_repeated_blocks)"
            )
        device = geometry.latents.device
        segments = self.tables.segments_on_device(self.reader.on_device(timestep).to(device), self.tables.edges)
        if self.places and self.tables.all_fp8(segments):
            tokens = tokens._replace(order="tile")
        calls = self.tables.traced_calls(tokens, device, segments)
        CURRENT.forward = Forward(self, tokens, segments, device, True, (), calls, [], CURRENT.forward)
        if tokens.order == "tile":
            CURRENT.forward.order = Order(*self.tables.order_on(tokens, device))
        if self._prepares:
            CURRENT.forward.prepare = self.tables.prepares(None)
            CURRENT.forward.text_first = geometry.text_position == "prefix"
        if self.linears.installed:
            CURRENT.forward.linears = self.tables.linears(segments, device)

    def _after_forward(self, transformer: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Counts what ran. Also called after an error."""
        forward = CURRENT.forward
        if torch.compiler.is_compiling():
            if forward is not None:
                CURRENT.forward = forward.before
            return
        if forward is None or forward.owner is not self:  # the pre-hook failed
            return
        CURRENT.forward, forward.shared = forward.before, None
        if output is None:
            self.selections.forget()  # lists that were due may not have been made
        if 0 < forward.places < self.places and output is not None and forward.tokens is not None:
            raise UnsupportedError(
                f"fpsattention.apply: {self.name} moved its tokens at {forward.places} of {self.places} places, expected all: a part of the "
                'model was left out or replaced: token_order="raster"'
            )
        self.count(forward)

    def _paths(self) -> list[str]:
        return [site.name.removeprefix(f"{self.name}.") for site in self.sites]

    def compiled_modules(self) -> bool:
        """Whether the transformer or blocks of it have been compiled in place (``compile``, ``compile_repeated_blocks``)."""
        blocks = [
            container._modules.get(name) for container, name in self._blocks
        ]  # looked up: they may be replaced, or gone
        return any(_is_compiled(module) for module in (self.transformer, *blocks, *self.modules))

    def replaced(self) -> dict[str, str]:
        """Attention modules whose processor somebody replaced after ``apply``: name to the class of what is there now."""
        pairs = zip(self.sites, self.modules, self._stand_ins, strict=True)
        return {site.name: type(installed(m)).__name__ for site, m, ours in pairs if installed(m) is not ours}

    def host_reads(self) -> int:
        """Reads of a noise level from the device."""
        return self.reader.host_reads

    def _notice_replaced(self) -> None:
        if not self._warned_replaced and any(
            installed(module) is not ours for module, ours in zip(self.modules, self._stand_ins, strict=True)
        ):
            self._warned_replaced = True
            name, kind = next(iter(self.replaced().items()))
            warnings.warn(
                f"fpsattention.apply: {name} has the processor {kind} now, which somebody set after apply: it runs without the "
                f"schedule, as do {len(self.replaced()) - 1} more (set processors first, then apply)",
                stacklevel=2,
            )

    def own_linears(self) -> Mapping[str, str]:
        """Linear layers that stay the model's own under FP8 linears, and why."""
        return self.linears.own

    def num_linears(self, layer: int) -> int:
        """FP8 linear layers of the block of an attention."""
        return self.linears.count(layer)

    # Debugging -------------------------------------------------------------------------------------------------------------

    def _check_finite(self, name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        tensors = {"q": q, "k": k, "v": v, "output": out}
        for label, tensor in tensors.items():
            self._report_nonfinite(name, label, tensor)
            if tensor.requires_grad:
                tensor.register_hook(
                    lambda grad, label=label: self._report_nonfinite(name, f"gradient of {label}", grad)
                )

    def _report_nonfinite(self, name: str, label: str, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()):
            with self._lock:
                self.nonfinite[f"{name}: {label}"] += 1
                first = self.nonfinite[f"{name}: {label}"] == 1
            if first:
                warnings.warn(
                    f"fpsattention.apply(debug=True): {name}: {label} has NaN or Inf, expected finite values",
                    stacklevel=2,
                )


def _num_heads(attentions: dict[str, Any]) -> int | None:
    """Heads of all attentions, or None where they are unknown or differ."""
    names = ("heads", "num_heads", "num_attention_heads")
    heads = {
        next((n for name in names if (n := getattr(x, name, None)) is not None), None) for x in attentions.values()
    }
    return heads.pop() if len(heads) == 1 else None


def _layers_with_linears(tables: LevelTables, paths: list[str]) -> list[tuple[int, str]]:
    """Index and path of the layers that run FP8 linears at some level."""
    own = {layer % len(paths) for layer in tables.schedule.own_linears if -len(paths) <= layer < len(paths)}
    groups = [any(level.linears == "fp8" for level in levels) for levels in tables.group_levels]
    return [(i, path) for i, path in enumerate(paths) if groups[tables.group_of_layer[i]] and i not in own]


def _containers(transformer: torch.nn.Module, paths: Iterable[str]) -> list[tuple[torch.nn.Module, str]]:
    """Where the blocks are that hold the attentions at ``paths``: a module, and the name of the block in it."""
    found = dict.fromkeys(path.rpartition(".")[0] for path in paths if "." in path)
    places = (path.rpartition(".") for path in found)
    return [(transformer.get_submodule(container), name) for container, _, name in places]


def _is_compiled(module: Any) -> bool:
    """In place, by a wrapper in its place, or by ``module.forward = torch.compile(module.forward)``."""
    return module is not None and (
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _constant(size: int) -> int:
    """A plain number, in a traced graph too: the tiles of a grid are planned for its sizes, so a graph serves one grid."""
    return int(size)


def _outside_of_dynamo() -> None:
    """``torch.compile(transformer)`` runs hooks as frames of their own: they stay Python there, where the host knows the level.

    Where they are called by code that is being traced (an outer function is compiled, the model is exported) they are traced.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # an older torch: the hooks become graphs of their own
        return
    for function, below in (
        (Installation._before_forward, _FrameAction.DEFAULT),
        (Installation._begin_forward, _FrameAction.SKIP),
        (Installation._after_forward, _FrameAction.SKIP),
    ):
        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, below))


_outside_of_dynamo()


def installation_of(transformer: Any) -> Installation | None:
    """The installation on ``transformer``, found through its hook: it comes along with copies and pickles."""
    for hook in getattr(transformer, "_forward_pre_hooks", {}).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Installation):
            return owner
    return None


def _spread(transformer: Any) -> Any:
    """How a forward is spread over ranks, where ``fpsattention.parallel.shard`` hooked the transformer."""
    owners: Any = (getattr(hook, "__self__", None) for hook in transformer._forward_pre_hooks.values())
    return next((owner.new_forward() for owner in owners if hasattr(owner, "new_forward")), None)


def parallelized(transformer: Any) -> str | None:
    """What cuts the sequence of a model for several devices and is not known, so that its attention sees a part of the tokens, or None."""
    if any(cls.__module__.split(".")[0] == "xfuser" for cls in type(transformer).__mro__):
        return f"{type(transformer).__name__} is parallelized by xDiT"
    if getattr(transformer, "_is_parallelized", False):
        return "the transformer is parallelized by ParaAttention or cache-dit (_is_parallelized)"
    return None


def unsupported(transformer: Any, adapter: Adapter | None) -> str | None:
    """Why a model cannot run under a schedule, or None. Changes nothing."""
    if adapter is None and (reason := refusal(transformer)) is not None:
        return f"{type(transformer).__name__} is refused: {reason}"
    if adapter is None:
        known = ", ".join(name for adapter in ADAPTERS for name in adapter.classes)
        return (
            f"{type(transformer).__name__} is not supported, expected one of {known}, or a pipeline of it: pass adapter=Adapter(...), or "
            "call fpsattention.attention where the model computes its attention"
        )
    config = getattr(transformer, "_parallel_config", None)
    if config is not None and getattr(config, "context_parallel_config", config) is None:
        return "enable_parallelism() with tensor parallelism was called on the transformer, expected whole heads: context parallelism works"
    if (parallel := parallelized(transformer)) is not None:
        return f"{parallel}, expected whole sequences on one device, or fpsattention.parallel.shard"
    attentions = adapter.attentions(transformer)
    if not attentions:
        return f"{type(transformer).__name__} has no attention that the adapter {adapter.name!r} names"
    for path, module in attentions.items():
        try:
            core_of(module, adapter.core)
        except UnsupportedError as error:
            return f"{path} {error}"
        head_dim = head_dim_of(module)
        if head_dim is not None and kernel_dim(head_dim) is None:
            return f"head dimension {head_dim}, expected at most {HEAD_DIMS[-1]}"
    return None


def check_recordable(installation: Installation) -> None:
    """Recording reads tensors in Python, which compiled blocks do not run, and its files hold as many queries as keys."""
    if installation.causal_text:
        raise UnsupportedError(
            f"fpsattention.record: {installation.adapter.name} has keys without queries, expected as many queries as keys"
        )
    if installation.compiled_modules():
        raise UnsupportedError(
            "fpsattention.record: the transformer is compiled, expected an eager one: record before compiling"
        )
