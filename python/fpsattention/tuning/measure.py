"""What a candidate costs in accuracy: squared errors of the engine's output, per layer, head and candidate, at recorded inputs.

``Inputs`` keeps the arguments of the transformer's forward in the middle of each phase of a dense run, so that everything else is measured
without sampling again. With sensitivities ``g`` (the mean square, over random directions r of the output, of the gradient of <r, velocity> with respect
to an attention output) the error that a head brings to the velocity is predicted as

    sum over tokens and channels of g^2 (O_candidate - O_dense)^2  /  sum of velocity^2

to first order, for errors that do not conspire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..analysis.captures import choose_tiles, tile_tokens
from ..errors import ConfigError, UnsupportedError
from ..integrations.installation import Installation
from ..integrations.state import CURRENT
from ..integrations.tokens import Grid, Tokens
from ..layout.masks import BlockMask, sliding_tile_mask
from ..layout.tiles import TileLayout, plan
from ..ops.checks import GRANULARITIES, kernel_dim
from ..ops.rotation import rotate
from ..patterns import get
from .candidates import RATIOS
from .settings import ROTATED

#: Called with q, k, v, output ``(B, S, H, D)`` and the softmax scale of one layer.
Look = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], None]


def phase_starts(phases: int, steps: int) -> list[int]:
    """First step of each phase, and ``steps``: where ``Schedule.edges_of`` puts the borders ``i / phases``."""
    return [int(i / phases * steps + 0.5) for i in range(phases + 1)]


class Inputs:
    """While active, a dense run of the pipeline leaves the transformer's arguments in the middle of each phase in ``folder``.

    Attributes:
        sigmas: of all steps, noisiest first, once a forward has run.
    """

    def __init__(self, installations: Sequence[Installation], folder: Path, phases: int):
        self.installations, self.folder, self.phases = installations, folder, phases
        self.sigmas: tuple[float, ...] = ()
        self._seen: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._seen.clear()
        hooks = [
            one.transformer.register_forward_pre_hook(self._hook(one), with_kwargs=True) for one in self.installations
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, installation: Installation) -> Callable[..., None]:
        def before(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(zip(installation._arguments, args, strict=False)) | kwargs
            geometry = installation.adapter.geometry(transformer, arguments)
            timestep = installation.reader.per_sample(geometry.timestep, geometry.latents.shape[0])
            run = installation.reader.trajectory(timestep)
            if run is None:
                raise UnsupportedError(
                    f"fpsattention.tune: the steps of {installation.name}'s run cannot be read from its timesteps, expected a pipeline with a "
                    "scheduler of falling timesteps"
                )
            self.sigmas = tuple(run)
            sigma = max(installation.reader.on_host(timestep))
            step = min(range(len(run)), key=lambda i: abs(run[i] - sigma))
            starts = phase_starts(self.phases, len(run))
            if len(run) < self.phases:
                raise ConfigError(
                    f"fpsattention.tune: phases {self.phases}, expected at most the {len(run)} steps of the run"
                )
            phase = next(p for p in range(self.phases) if starts[p] <= step < starts[p + 1])
            if phase not in self._seen and step >= (starts[phase] + starts[phase + 1] - 1) // 2:
                # With classifier-free guidance the first forward of a step is the conditional one.
                self._seen.add(phase)
                self.folder.mkdir(parents=True, exist_ok=True)
                kept = {name: _to(value, "cpu") for name, value in arguments.items() if name != "return_dict"}
                saved = {"transformer": installation.name, "sigma": sigma, "arguments": kept}
                torch.save(saved, self.folder / f"phase{phase}.tmp")
                (self.folder / f"phase{phase}.tmp").rename(self.folder / f"phase{phase}.pt")  # whole, or not there

        return before

    def load(self, phase: int) -> tuple[Installation, float, dict[str, Any]]:
        """The transformer that runs in a phase, the sigma, and its arguments, on its device."""
        path = self.folder / f"phase{phase}.pt"
        saved = torch.load(path, weights_only=False)  # our own file; arguments may be any kind of object
        installation = next(one for one in self.installations if one.name == saved["transformer"])
        device = next(installation.transformer.parameters()).device
        return installation, saved["sigma"], {k: _to(v, device) for k, v in saved["arguments"].items()}


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_to(x, device) for x in value)
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value


@contextmanager
def looking(installation: Installation, look: Look) -> Iterator[None]:
    """Within, ``look`` sees every call of every layer, after it."""

    def watched(site: Any) -> Any:
        original = site.attend

        def attend(core: Any) -> Tensor:
            out: Tensor = original(core)
            scale = core.q.shape[3] ** -0.5 if core.scale is None else core.scale
            look(site.layer, core.q, core.k, core.v, out, scale)
            return out

        return attend

    for site in installation.sites:
        site.attend = watched(site)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for site in installation.sites:
            del site.__dict__["attend"]


def layout_now(tile: Grid | None) -> TileLayout:
    """Of the forward that is running."""
    forward = CURRENT.forward
    assert forward is not None and forward.tokens is not None
    tokens: Tokens = forward.tokens
    return plan(tokens.grid, tile, tokens.text_len, tokens.text_position if tokens.text_len else "suffix")


class Rows:
    """The query tokens that are looked at: whole tiles, the same ones for everything of a layout."""

    def __init__(self, layout: TileLayout, rows: int, seed: int):
        self.layout = layout
        self.tiles = choose_tiles(layout, rows, seed)
        tokens = tile_tokens(layout)
        self.tokens = torch.cat([tokens[tile] for tile in self.tiles])
        self.scale_up = layout.num_tokens / len(self.tokens)  # from these rows to all


def sensitivities(
    installation: Installation, arguments: Mapping[str, Any], tile: Grid | None, rows: int, probes: int, seed: int
) -> tuple[dict[int, Tensor], float]:
    """Layer to mean square gradients ``[B, rows, H, D]`` at the rows looked at, and the sum of the velocity's squares."""
    transformer = installation.transformer
    outs: dict[int, Tensor] = {}
    chosen: list[Rows] = []

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        if not chosen:
            chosen.append(Rows(layout_now(tile), rows, seed))
        outs[layer] = out

    flags = [p.requires_grad for p in transformer.parameters()]
    transformer.requires_grad_(False)
    arguments = {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    latents = installation.adapter.geometry(transformer, arguments).latents
    latents.requires_grad_(True)  # something has to, for there to be a graph
    try:
        with torch.enable_grad(), looking(installation, look):
            velocity = _velocity(transformer, arguments)
            generator = torch.Generator().manual_seed(seed)
            squares: dict[int, Tensor] = {}
            for probe in range(probes):
                direction = torch.randn(velocity.shape, generator=generator).to(velocity.device, velocity.dtype)
                keep = probe + 1 < probes
                grads = torch.autograd.grad(
                    velocity, list(outs.values()), direction, retain_graph=keep, allow_unused=True
                )
                for layer, grad in zip(outs, grads, strict=True):
                    if grad is not None:
                        g = grad.detach()[:, chosen[0].tokens.to(grad.device)].float().square() / probes
                        squares[layer] = squares[layer] + g if layer in squares else g
    finally:
        for parameter, flag in zip(transformer.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return squares, float(velocity.detach().float().square().sum())


def _velocity(transformer: Any, arguments: Mapping[str, Any]) -> Tensor:
    out = transformer(**arguments, return_dict=False)
    velocity: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return velocity


def measure_phase(
    installation: Installation,
    arguments: Mapping[str, Any],
    *,
    tile: Grid | None,
    rows: int,
    seed: int,
    windows_of: Callable[[TileLayout], list[Grid]],
    kinds: Sequence[str],
    patterns: Sequence[str],
    weights: tuple[dict[int, Tensor], float] | None,
    wanted: Callable[[int], bool],
    found: Callable[[int, dict[str, list[list[float]]]], None],
) -> None:
    """One forward of the dense model; every wanted layer's errors go to ``found`` as soon as they are there.

    Args:
        weights: of ``sensitivities``; None: errors are relative to the layer's own output.
        found: called with the layer and kind -> ``[heads][options]`` relative squared errors.
    """
    chosen: list[Rows] = []

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        if not chosen:
            chosen.append(Rows(layout_now(tile), rows, seed))
        if wanted(layer):
            at = chosen[0]
            weight, total = (None, None) if weights is None else (weights[0].get(layer), weights[1])
            squares, own = cell_errors(q, k, v, at, windows_of(at.layout), kinds, scale, weight, patterns)
            if weights is not None and weight is None:  # the output does not depend on this layer
                squares = {name: torch.zeros_like(x) for name, x in squares.items()}
            norm = own if total is None else total
            found(layer, {name: (x * (at.scale_up / max(norm, 1e-30))).tolist() for name, x in squares.items()})

    with torch.no_grad(), looking(installation, look):
        _velocity(installation.transformer, arguments)


def cell_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    windows: Sequence[Grid],
    kinds: Sequence[str],
    scale: float,
    weight: Tensor | None,
    patterns: Sequence[str] = (),
) -> tuple[dict[str, Tensor], float]:
    """Squared errors ``[heads, windows]`` of the FP8 op against FP32 attention, by kind, summed over the rows; those of a pattern's ratios, with
    the first kind's scales, summed over the heads as well: ``[1, ratios]``; and, scaled up to all rows, the sum of the output's squares.

    Args:
        q, k, v: ``(B, S, H, D)``.
        weight: ``[B, rows, H, D]``, of each squared difference; None: 1.
    """
    import fpsattention.ops  # noqa: F401  registers torch.ops.fpsattn
    from fpsattention.ops.attend import k_mean_stride

    dim, device, layout = q.shape[3], q.device, rows.layout
    if v.dtype == torch.float32 and device.type != "cpu":
        v = v.bfloat16()  # as the engine runs it there
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    tokens = rows.tokens.to(device)
    exact = torch.cat([  # a head at a time: the scores of all heads would not fit
        scaled_dot_product_attention(q[:, h : h + 1, tokens].float(), k[:, h : h + 1].float(), v[:, h : h + 1].float(), scale=scale)
        for h in range(q.shape[1])
    ], 1)  # fmt: skip
    zeros = (0, (kernel_dim(dim) or dim) - dim)
    q, k, v = (pad(x, zeros).contiguous() if zeros[1] else x.contiguous() for x in (q, k, v))
    token_of_slot, tile_of_block, offsets = (
        table.to(device) for table in (layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets)
    )
    visible = torch.zeros(layout.num_tiles, dtype=torch.int32)
    visible[rows.tiles] = 1
    visible = visible.to(device)
    factor = None if weight is None else weight.transpose(1, 2).to(device)

    def squares(quantized: Sequence[Tensor], mask: BlockMask) -> Tensor:
        """Per head."""
        q8, k8, v8t, q_scale, k_scale, v_scale, _, q_k_mean, *_ = quantized
        out = torch.ops.fpsattn.forward(
            q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, mask.kv_num_blocks.to(device) * visible,
            mask.kv_indices.to(device), num_tokens=layout.num_tokens, softmax_scale=scale,
            out_dtype=torch.float32, q_k_mean=q_k_mean,
        )[0]  # fmt: skip
        square = (out[:, :, tokens, :dim] - exact).square()
        return (square if factor is None else square * factor).sum((0, 2, 3)).cpu()

    found = {}
    for kind in reversed(kinds):  # the first one's stay for the patterns
        granularity = GRANULARITIES[kind.removesuffix(ROTATED)]
        rotated = (rotate(q), rotate(k)) if kind.endswith(ROTATED) else (q, k)
        quantized = torch.ops.fpsattn.quantize(
            *rotated, v, token_of_slot, offsets, granularity=granularity, smooth_k=True, pow2_scales=False,
            k_mean_stride=k_mean_stride(layout.num_tokens),
        )  # fmt: skip
        found[kind] = torch.stack([squares(quantized, sliding_tile_mask(layout, window)) for window in windows], 1)
    on_device = layout.to(device)
    for name in patterns:
        masks = (get(name, ratio=ratio)(q[..., :dim], k[..., :dim], on_device) for ratio in RATIOS)
        found[name] = torch.stack([squares(quantized, mask).sum() for mask in masks]).unsqueeze(0)
    return found, float(exact.square().sum()) * rows.scale_up
