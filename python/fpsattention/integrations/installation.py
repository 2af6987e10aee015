"""One transformer under a schedule: its processors, its forward pre-hook, its counters."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..schedule import Schedule
from .checkpointing import SnapshotCheckpoint
from .levels import Grid, LevelTables
from .record import Recorder
from .report import Row
from .sigmas import SigmaReader
from .wan import FPSWanAttnProcessor


class Installation:
    """Processors on every ``attn1`` of ``transformer`` and a pre-hook that tells them, once per forward, what to do.

    Args:
        name: of the transformer in its pipeline, for messages and reports.
        scheduler: returns the pipeline's scheduler, or None.
    """

    def __init__(
        self,
        transformer: Any,  # WanTransformer3DModel, whose attributes diffusers does not type
        schedule: Schedule,
        name: str,
        scheduler: Callable[[], Any],
        num_train_timesteps: int,
        on_unsupported: str,
        debug: bool,
    ):
        config = transformer.config
        # Not type(transformer).__name__: FSDP2 and users subclass it.
        schedule.check_model(WanTransformer3DModel.__name__, config.num_layers, config.num_attention_heads)
        self.transformer = transformer
        self.name = name
        self.tables = LevelTables(schedule, config.num_layers, config.num_attention_heads)
        self.reader = SigmaReader(scheduler, num_train_timesteps)
        self.recorder: Recorder | None = None
        self.nonfinite: Counter[str] = Counter()
        self._host_counts: Counter[tuple[Grid, int]] = Counter()  # (grid, segment) -> samples
        self._device_counts: dict[tuple[Grid, torch.device], Tensor] = {}  # int64 [segments]
        self.processors: list[FPSWanAttnProcessor] = []
        for i, block in enumerate(transformer.blocks):
            processor = FPSWanAttnProcessor(block.attn1.processor, f"{name}.blocks.{i}.attn1", on_unsupported)
            if debug:
                processor.observers.append(self._check_finite)
            block.attn1.set_processor(processor)
            self.processors.append(processor)
        self._hook = transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def remove(self) -> None:
        """Put the original processors back; an attention whose processor somebody else replaced since is left alone."""
        self._hook.remove()
        for block, processor in zip(self.transformer.blocks, self.processors, strict=True):
            if block.attn1.processor is processor:
                block.attn1.set_processor(processor.original)
        checkpoint = self.transformer._gradient_checkpointing_func
        if isinstance(checkpoint, SnapshotCheckpoint):
            self.transformer._gradient_checkpointing_func = checkpoint.function

    # Every forward ---------------------------------------------------------------------------------------------------------

    def _before_forward(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads grid and sigma from the arguments of the transformer and leaves every processor its Call."""
        latents = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        patch = self.transformer.config.patch_size
        t, h, w = (int(size) // p for size, p in zip(latents.shape[2:], patch, strict=True))
        grid = (t, h, w)
        timestep = self.reader.per_sample(timestep, latents.shape[0])

        segments: Tensor | list[int]
        if self.tables.needs_host or self.recorder is not None:
            sigmas = self.reader.on_host(timestep)
            if self.recorder is not None:
                self.recorder.begin(self.name, sigmas, grid)
        if self.tables.needs_host:
            segments = [self.tables.schedule.segment(sigma) for sigma in sigmas]
            self._host_counts.update((grid, segment) for segment in segments)
        else:
            segments = self.tables.segments_on_device(self.reader.on_device(timestep).to(latents.device))
            self._count_on_device(grid, segments)

        calls = self.tables.calls(grid, latents.device, segments, backward=torch.is_grad_enabled())
        for group, processor in zip(self.tables.group_of_layer, self.processors, strict=True):
            processor.call = calls[group]
        if self.transformer.gradient_checkpointing and torch.is_grad_enabled():
            checkpoint = self.transformer._gradient_checkpointing_func
            if not isinstance(checkpoint, SnapshotCheckpoint):
                self.transformer._gradient_checkpointing_func = SnapshotCheckpoint(checkpoint)

    def _count_on_device(self, grid: Grid, segments: Tensor) -> None:
        counts = self._device_counts.get((grid, segments.device))
        if counts is None:
            counts = torch.zeros(len(self.tables.edges) + 1, dtype=torch.int64, device=segments.device)
            self._device_counts[grid, segments.device] = counts
        counts.index_add_(0, segments, torch.ones_like(segments))

    # Reports ---------------------------------------------------------------------------------------------------------------

    def counts(self) -> Counter[tuple[Grid, int]]:
        """Samples by (grid, segment). Reads the device's counters, so it waits for the device."""
        counts = Counter(self._host_counts)
        for (grid, _), tensor in self._device_counts.items():
            counts.update({(grid, segment): n for segment, n in enumerate(tensor.tolist()) if n})
        return counts

    def reset(self) -> None:
        """Forget all counts."""
        self._host_counts.clear()
        self._device_counts.clear()
        self.nonfinite.clear()
        self.reader.host_reads = 0
        for processor in self.processors:
            processor.executions.clear()
            processor.fallbacks.clear()

    def rows(self) -> list[Row]:
        """Report rows of all layers; segments of one level are put together."""
        counts = self.counts()
        grids = list(dict.fromkeys(grid for grid, _ in counts))
        rows = []
        for layer, group in enumerate(self.tables.group_of_layer):
            levels = self.tables.group_levels[group]
            for level in dict.fromkeys(reversed(levels)):  # falling sigma
                of_level = [segment for segment, other in enumerate(levels) if other == level]
                calls, attended = 0, 0.0
                for grid in grids:
                    for segment in of_level:
                        n = counts[grid, segment]
                        calls += n
                        attended += n * self.tables.tables(grid).density(group, segment) if n else 0.0
                windows: tuple[Grid, ...] = ()
                density = 1.0 if level.precision == "bf16" else float("nan")
                if grids:
                    table = self.tables.tables(grids[-1])
                    density = attended / calls if calls else table.density(group, of_level[-1])
                    if level.precision == "fp8" and table.windows(group, of_level[-1]) != (table.layout.tile_grid,):
                        windows = tuple(dict.fromkeys(table.windows(group, of_level[-1])))
                granularity = level.granularity if level.precision == "fp8" else ""
                rows.append(Row(self.name, layer, level.name, level.precision, granularity, windows, density, calls))
        return rows

    def executions(self) -> list[int] | None:
        """Eager runs of each layer's processor, in samples; None where blocks or the model are compiled."""
        compiled = any(m._compiled_call_impl is not None for m in (self.transformer, *self.transformer.blocks))
        return None if compiled else [sum(processor.executions.values()) for processor in self.processors]

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
            self.nonfinite[f"{name}: {label}"] += 1
            if self.nonfinite[f"{name}: {label}"] == 1:
                warnings.warn(
                    f"fpsattention.apply(debug=True): {name}: {label} has NaN or Inf, wanted finite values",
                    stacklevel=2,
                )


def unsupported(transformer: Any) -> str | None:
    """Why a model cannot run under a schedule, or None. Changes nothing."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    if not isinstance(transformer, WanTransformer3DModel):
        return (
            f"{type(transformer).__name__} is not supported, wanted WanTransformer3DModel (Wan2.1, Wan2.2) or a pipeline of it: "
            "HunyuanVideo, CogVideoX, LTX and Mochi have no adapter; fpsattention.attention can be called from their processors"
        )
    model: Any = transformer
    head_dim = model.config.attention_head_dim
    if head_dim not in (64, 128):
        return f"head dimension {head_dim}, wanted 64 or 128"
    if getattr(transformer, "_parallel_config", None) is not None:
        return "enable_parallelism() was called on the transformer, wanted whole sequences and heads on one device"
    for i, block in enumerate(model.blocks):
        processor = block.attn1.processor
        if isinstance(processor, FPSWanAttnProcessor):
            raise ConfigError(
                "fpsattention.apply: a schedule is applied already, wanted none: call remove() on its handle first"
            )
        if type(processor) is not WanAttnProcessor:
            return (
                f"blocks.{i}.attn1 has the processor {type(processor).__name__}, wanted diffusers' own WanAttnProcessor"
            )
    return None


def check_not_compiled(transformer: Any) -> None:
    """Recording reads tensors in Python, which compiled blocks do not run."""
    if any(m._compiled_call_impl is not None for m in (transformer, *transformer.blocks)):
        raise UnsupportedError(
            "fpsattention.record: the transformer is compiled, wanted an eager one: record before compiling"
        )
