"""Where the error of FPSAttention comes from, on recorded q, k, v: quantization and sparsity apart.

`Handle.record()` writes one safetensors file per capture: tensors q, k, v [B, S, H, D], `sigma` [B], `grid` [3], and metadata
strings `layer`, `model`, `tile`, `text_len`, `text_position`, `exact` (frames that are dense in both directions, "0,8"); files of other
tools may give `grid` ("T,H,W") and `sigma` as such strings, too. The padding of a text counts as text. Each capture is compared three ways, always against dense full-precision attention of the same q, k, v:

    quantization   FP8 with every block attended      (nothing skipped, everything rounded)
    sparsity       full precision under the mask      (nothing rounded, blocks skipped)
    total          FP8 under the mask                 (what runs)

and `quantization_same_mask`, FP8 under the mask against full precision under the mask. Full precision is FP32 with FP32
accumulation, whose own error (about 1e-6) is four orders below what is measured.

Memory: one (batch, head) at a time and one query tile at a time; `max_rows` bounds the query tokens looked at. Query tiles
that are not looked at get an empty list, so the FP8 kernels skip them, while scales and key statistics stay those of the
whole tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from ..ops.checks import GRANULARITIES, INT8
from .metrics import ErrorSum, jsonable
from .optional import require

PARTS = ("quantization", "sparsity", "total", "quantization_same_mask")


@dataclass(frozen=True)
class Capture:
    """A recorded self-attention call; the tensors are read when asked for."""

    path: Path
    layer: int
    sigma: float
    grid: tuple[int, int, int]
    text_len: int = 0
    text_position: str = "suffix"
    model: str = ""
    exact: tuple[int, ...] = ()

    def load(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, each [B, S, H, D]."""
        safetensors = require("safetensors", "analyze")
        with safetensors.safe_open(str(self.path), framework="pt") as file:
            missing = {"q", "k", "v"} - set(file.keys())
            if missing:
                raise ConfigError(
                    f"fpsattention.analyze: {self.path} has no tensor {sorted(missing)[0]!r}, expected q, k and v"
                )
            q, k, v = (file.get_tensor(name) for name in "qkv")
        wanted = self.grid[0] * self.grid[1] * self.grid[2] + self.text_len
        if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape or q.shape[1] != wanted:
            raise ConfigError(
                f"fpsattention.analyze: {self.path} holds q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected "
                f"three times [B, {wanted}, H, D] for grid {self.grid} and text_len {self.text_len}"
            )
        return q, k, v


def find_captures(folder: str | Path) -> list[Capture]:
    """The captures in `folder`, by layer and falling sigma."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"fpsattention.analyze: {folder} is not a folder, expected one that Handle.record() wrote")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ConfigError(
            f"fpsattention.analyze: no *.safetensors in {folder}, expected what Handle.record() wrote: run the pipeline after "
            "handle.record(dir=folder)"
        )
    return sorted(
        map(_read_header, paths), key=lambda capture: (capture.model, capture.layer, -capture.sigma, str(capture.path))
    )


def _read_header(path: Path) -> Capture:
    safetensors = require("safetensors", "analyze")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if "sigma" in file.keys():  # noqa: SIM118  (not a dict)
                metadata["sigma"] = repr(float(file.get_tensor("sigma").max()))
            if "grid" in file.keys():  # noqa: SIM118
                metadata["grid"] = ",".join(str(size) for size in file.get_tensor("grid").tolist())
    except Exception as error:  # safetensors has its own error types, by version
        raise ConfigError(f"fpsattention.analyze: {path} cannot be read as safetensors: {error}") from error
    try:
        missing = [key for key in ("layer", "sigma", "grid") if key not in metadata]
        if missing:
            raise ValueError(f"no {missing[0]!r}, expected a file that Handle.record() wrote")
        sizes = tuple(int(part) for part in str(metadata["grid"]).split(","))
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"grid {metadata['grid']!r}, expected 'T,H,W'")
        return Capture(
            path=path,
            layer=int(metadata["layer"]),
            sigma=float(metadata["sigma"]),
            grid=sizes,
            text_len=int(metadata.get("text_len", "0")),
            text_position=metadata.get("text_position", "suffix"),
            model=metadata.get("model", ""),
            exact=tuple(int(frame) for frame in metadata.get("exact", "").split(",") if frame),
        )
    except ValueError as error:
        raise ConfigError(f"fpsattention.analyze: {path}: {error}") from error


def choose_tiles(layout: Any, max_rows: int | None, seed: int = 0) -> list[int]:
    """Query tiles to look at: all of them, or a random choice (fixed by `seed`) of about `max_rows` tokens, at least one."""
    if max_rows is None or layout.num_tokens <= max_rows:
        return list(range(layout.num_tiles))
    if max_rows < 1:
        raise ConfigError(f"fpsattention.analyze: rows is {max_rows}, expected at least 1")
    order = torch.randperm(layout.num_tiles, generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = tile_tokens(layout)
    chosen: list[int] = []
    rows = 0
    for tile in order:
        if chosen and rows + len(tokens[tile]) > max_rows:
            break
        chosen.append(tile)
        rows += len(tokens[tile])
    return sorted(chosen)


def tile_tokens(layout: Any) -> list[torch.Tensor]:
    """Token indices of each tile, int64, in slot order."""
    slots = layout.token_of_slot.cpu().long()
    offsets = [128 * block for block in layout.tile_block_offsets.tolist()]
    spans = (slots[a:b] for a, b in zip(offsets, offsets[1:], strict=False))
    return [span[span >= 0] for span in spans]


def split_error(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    granularity: Any,
    *,
    max_rows: int | None = None,
    seed: int = 0,
    smooth_k: bool = True,
    precision: str = "fp8",
    hadamard: bool = False,
) -> dict[str, dict[str, Any]]:
    """Error of FPSAttention split by cause: `PARTS` to the metrics of `compare`.

    Args:
        q, k, v: [B, S, H, D], tokens as `mask.layout` describes them.
        mask: `BlockMask` of the level.
        granularity: "tile", "block", "token", or a size of scale groups.
        precision, hadamard: of the level, "fp8", "int8" or "paper"; what is said of FP8 below holds for all.
        max_rows: look at about this many query tokens per head (None: all).
    """
    layout = mask.layout
    if q.ndim != 4 or q.shape[1] != layout.num_tokens:
        raise ConfigError(
            f"fpsattention.analyze: q has shape {tuple(q.shape)}, expected [B, {layout.num_tokens}, H, D] as grid {layout.grid} "
            f"with text_len {layout.text_len} says"
        )
    chosen = choose_tiles(layout, max_rows, seed)
    tokens = tile_tokens(layout)
    rows = torch.cat([tokens[tile] for tile in chosen])
    sums = {part: ErrorSum() for part in PARTS}
    batch, _, heads, dim = q.shape
    for b in range(batch):
        for h in range(heads):
            head = [x[b : b + 1, :, h : h + 1].transpose(1, 2) for x in (q, k, v)]  # [1, 1, S, D]
            counts, indices = _lists_of(mask, b, h)
            fp8_dense, fp8_masked = _fp8(
                head, layout, counts, indices, chosen, granularity, smooth_k, precision, hadamard
            )
            dense, masked = _exact(head, layout, counts, indices, chosen, tokens)
            sums["quantization"].add(fp8_dense[rows], dense)
            sums["sparsity"].add(masked, dense)
            sums["total"].add(fp8_masked[rows], dense)
            sums["quantization_same_mask"].add(fp8_masked[rows], masked)
    return {part: total.result() for part, total in sums.items()}


def _lists_of(mask: Any, batch: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of one (batch, head), as [1, 1, tiles] and [1, 1, tiles, max]."""
    b = batch if mask.kv_num_blocks.shape[0] > 1 else 0
    h = head if mask.kv_num_blocks.shape[1] > 1 else 0
    return mask.kv_num_blocks[b : b + 1, h : h + 1].cpu(), mask.kv_indices[b : b + 1, h : h + 1].cpu()


def _fp8(
    head: Sequence[torch.Tensor],
    layout: Any,
    counts: torch.Tensor,
    indices: torch.Tensor,
    chosen: Sequence[int],
    granularity: Any,
    smooth_k: bool,
    precision: str,
    hadamard: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 outputs [S, D] (FP32) with every block attended and under the mask; rows of other tiles are zero."""
    from ..layout.masks import Lists
    from ..layout.scale_groups import groups_of
    from ..ops import published  # also registers torch.ops.fpsattn
    from ..ops.attend import k_mean_stride
    from ..ops.rotation import rotate

    q, k, v = head
    if hadamard:
        q, k = rotate(q), rotate(k)
    device = q.device
    visible = torch.zeros_like(counts)
    visible[..., list(chosen)] = 1
    every = torch.arange(layout.num_blocks, dtype=torch.int32).expand(1, 1, layout.num_tiles, layout.num_blocks)
    tables = (layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets)
    lists = [
        Lists(*tables, number, index, None, None).to(device)
        for number, index in ((visible * layout.num_blocks, every.contiguous()), (visible * counts, indices))
    ]
    if not isinstance(granularity, str):
        lists = [groups_of(layout.to(device), granularity).of(one) for one in lists]
        granularity = "tile"
    q8, k8, v8t, q_scale, k_scale, v_scale, _, q_k_mean, *_ = torch.ops.fpsattn.quantize(
        q,
        k,
        v,
        lists[0].token_of_slot,
        lists[0].tile_block_offsets,
        granularity=INT8 if precision == "int8" else GRANULARITIES[granularity],
        smooth_k=smooth_k and precision != "paper",
        pow2_scales=False,
        k_mean_stride=k_mean_stride(layout.num_tokens),
    )
    outs = []
    forward = published.forward if precision == "paper" else torch.ops.fpsattn.forward
    for one in lists:  # FP32: the output's own rounding is not measured
        out = forward(
            q8, k8, v8t, q_scale, k_scale, v_scale, one.token_of_slot, one.tile_of_block, one.kv_num_blocks, one.kv_indices,
            num_tokens=layout.num_tokens, softmax_scale=q.shape[-1] ** -0.5, out_dtype=torch.float32, q_k_mean=q_k_mean,
        )[0]  # fmt: skip
        outs.append(out[0, 0])
    return outs[0], outs[1]


def _exact(
    head: Sequence[torch.Tensor],
    layout: Any,
    counts: torch.Tensor,
    indices: torch.Tensor,
    chosen: Sequence[int],
    tokens: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP32 outputs of the chosen tiles, concatenated [rows, D]: dense, and under the mask."""
    q, k, v = (x[0, 0].float() for x in head)
    slots = layout.token_of_slot.to(q.device).long().view(-1, 128)
    dense, masked = [], []
    for tile in chosen:
        row = q[tokens[tile].to(q.device)][None]
        dense.append(scaled_dot_product_attention(row, k[None], v[None])[0])
        count = int(counts[0, 0, tile])
        keys = slots[indices[0, 0, tile, :count].long().to(q.device)].reshape(-1)
        keys = keys[keys >= 0]
        if keys.numel() == 0:  # an empty row gives zeros
            masked.append(torch.zeros_like(row[0]))
            continue
        masked.append(scaled_dot_product_attention(row, k[keys][None], v[keys][None])[0])
    return torch.cat(dense), torch.cat(masked)


def analyze_captures(
    captures: Sequence[Capture],
    schedule: Any,
    *,
    level: str | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[Capture], None] | None = None,
) -> list[dict[str, Any]]:
    """One record per capture: layer, sigma, level, granularity, density and the four parts' metrics.

    Args:
        schedule: `Schedule`; says which level runs at a capture's sigma and layer.
        level: evaluate this level of the schedule at every sigma instead.
        on_step: called after each capture (progress).
    """
    return list(_analyze(captures, schedule, level, max_rows, seed, device, on_step))


def _analyze(
    captures: Sequence[Capture],
    schedule: Any,
    level_name: str | None,
    max_rows: int | None,
    seed: int,
    device: str,
    on_step: Callable[[Capture], None] | None,
) -> Iterator[dict[str, Any]]:
    if level_name is not None and level_name not in schedule.levels:
        raise ConfigError(
            f"fpsattention.analyze: level {level_name!r} is not in the schedule, expected one of {', '.join(schedule.levels)}"
        )
    for capture in captures:
        level = schedule.levels[level_name] if level_name else schedule.at(capture.sigma, capture.layer)
        record: dict[str, Any] = {
            "file": capture.path.name,
            "model": capture.model,
            "layer": capture.layer,
            "sigma": capture.sigma,
            "grid": list(capture.grid),
            "level": level.name,
            "precision": level.precision,
            "density": 1.0,
            "rows": None,
        }
        if level.precision != "bf16":
            q, k, v, mask = _attended(schedule, level, capture, device)
            record["granularity"] = level.scales
            record["density"] = float(mask.density)
            record["rows"] = min(mask.layout.num_tokens, max_rows or mask.layout.num_tokens)
            record.update(split_error(
                q, k, v, mask, level.granularity, max_rows=max_rows, seed=seed, precision=level.precision, hadamard=level.hadamard,
            ))  # fmt: skip
        if on_step is not None:
            on_step(capture)
        yield record


def _attended(schedule: Any, level: Any, capture: Capture, device: str) -> tuple[Any, ...]:
    """q, k, v of a capture and the mask of a level; of a pattern that permutes in its orders, which change no error."""
    from ..layout.tiles import plan
    from ..ops.selection import measured

    q, k, v = (x.to(device) for x in capture.load())
    text = (capture.text_len, capture.text_position)
    if level.pattern is None or not level.pattern.pattern.permutes:
        mask = level_mask(
            schedule, level, capture.grid, q.shape[2], capture.layer, *text, tensors=(q, k, v), exact=capture.exact
        )
        return q, k, v, mask
    if capture.exact:
        raise ConfigError(
            f"fpsattention.analyze: {capture.path} has exact frames {capture.exact}, which {level.pattern.name} of level {level.name!r} permutes, "
            "wanted another pattern"
        )
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    layout = plan(capture.grid, schedule.tile, *text).to(device)
    made, _ = measured(level.pattern, level.granularity, layout, *heads_first)
    return *(x.transpose(1, 2) for x in made.permuted(*heads_first)), made.mask


def error_series(records: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points of `plots.plot_error_vs_sigma`: relative L1 of quantization, sparsity and total, mean over the layers of a sigma."""
    series: dict[str, list[tuple[float, float]]] = {}
    for part in ("quantization", "sparsity", "total"):
        for sigma in sorted({record["sigma"] for record in records}, reverse=True):
            found = [r[part]["rel_l1"] if part in r else 0.0 for r in records if r["sigma"] == sigma]
            series.setdefault(part, []).append((sigma, sum(found) / len(found)))
    return series


def level_mask(
    schedule: Any,
    level: Any,
    grid: Sequence[int],
    num_heads: int,
    layer: int | None = None,
    text_len: int = 0,
    text_position: str = "suffix",
    tensors: tuple[Any, Any, Any] | None = None,
    exact: Sequence[int] = (),
) -> Any:
    """`BlockMask` of a level of `schedule` on a grid: one list for all heads, or one per head where heads have windows.

    `tensors`: q, k, v `(B, S, H, D)`, for levels whose pattern reads them; the mask is then on their device. `exact`: frames of the grid that are
    dense in both directions.
    """
    from ..integrations.tokens import head_masks, resolve_window
    from ..layout.exact import frames, held_blocks, with_exact
    from ..layout.tiles import plan
    from ..ops.selection import measured

    layout = plan(grid, schedule.tile, text_len, text_position)
    ranges = frames(exact, layout)
    pattern = level.pattern if layer is None or level.pattern is None else level.pattern.of_layer(layer)
    if pattern is None:
        windows = [resolve_window(window, layout) for window in schedule.windows(level, layer, num_heads)]
        return with_exact(head_masks(layout, windows), ranges)
    if pattern.static:
        return with_exact(head_masks(layout, [pattern]), ranges)
    if pattern.pattern.permutes or tensors is None:
        came = "permutes the tokens of every head" if pattern.pattern.permutes else "reads q and k, which are not given"
        raise ConfigError(
            f"fpsattention.analyze: level {level.name!r} has the pattern {pattern.name}, which {came}, expected one that makes a mask of tiles"
        )
    q, k, v = (x.transpose(1, 2) for x in tensors)
    blocks = held_blocks(layout, ranges).to(q.device) if ranges else None
    return measured(pattern, level.granularity, layout.to(q.device), q, k, v, blocks)[0]


def save_json(path: str | Path, value: Any) -> Path:
    """Write strict JSON (NaN and infinities become null)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path
