"""Recording q, k, v of chosen layers and sigmas, for ``fpsattn analyze`` and for looking at real activations."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError

RECORD_FORMAT = "fpsattn-record/1"


class Recorder:
    """Writes one safetensors file per (layer, recorded forward) until ``stop()``; also a context manager.

    Tensors of a file: ``q, k, v (B, S, H, D)`` after norms and RoPE, in the model's dtype, B = 1 where a model attends sample by
    sample: the first; ``sigma`` f64 ``[B]``; ``grid`` int64 ``[3]``; metadata: ``format``, ``layer``, ``model``, ``tile`` (``"auto"``
    or ``"6,8,8"``), ``text_len`` (tokens of S that are not of the grid), ``text_position``, ``exact`` (frames of the grid that are dense in both
    directions, ``"0,8"``).

    Args:
        folder: created if need be. Recordings of another run in it are an error: nobody could tell them apart.
        layers: indices, None: all.
        sigmas: targets. A target is met by the first forward at or below it (a trajectory falls from 1 to 0); None: the first
            forward at every distinct sigma. With classifier-free guidance the first forward is the conditional one.
        on_stop: called once.
    """

    def __init__(
        self,
        folder: str | Path,
        layers: Iterable[int] | None,
        sigmas: Iterable[float] | None,
        tile: tuple[int, int, int] | None,
        on_stop: Callable[[Recorder], None],
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if found := len(list(self.folder.glob("*.safetensors"))):
            raise ConfigError(
                f"fpsattention.record: dir '{self.folder}' holds {found} *.safetensors files, expected a new folder, or one without recordings"
            )
        self.layers = None if layers is None else frozenset(layers)
        self.pending = None if sigmas is None else sorted(set(sigmas), reverse=True)
        self.tile = "auto" if tile is None else ",".join(map(str, tile))
        self.files: list[Path] = []
        self._on_stop = on_stop
        self._seen: set[tuple[str, float]] = set()
        self._pending_of: dict[str, list[float]] = {}
        self._lowest = float("inf")
        self._lock = threading.Lock()
        # Sigma, grid, text position and exact frames of the forward that this thread is in, or None: not recorded.
        self._now = threading.local()

    def begin(
        self,
        model: str,
        sigma: list[float],
        grid: tuple[int, int, int],
        text_position: str = "suffix",
        exact: tuple[int, ...] = (),
    ) -> None:
        """A forward of ``model`` starts; decides whether it is recorded."""
        top = max(sigma)
        with self._lock:
            self._lowest = min(self._lowest, top)
            if self.pending is None:
                wanted = (model, top) not in self._seen
                self._seen.add((model, top))
            else:
                pending = self._pending_of.setdefault(model, list(self.pending))
                met = [target for target in pending if top <= target + 1e-6]
                wanted = bool(met)
                self._pending_of[model] = [target for target in pending if target not in met]
        self._now.forward = (sigma, grid, text_position, exact) if wanted else None

    def save(self, model: str, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Write one layer of the current forward, if it is recorded."""
        forward = getattr(self._now, "forward", None)
        if forward is None or (self.layers is not None and layer not in self.layers):
            return
        sigma, grid, text_position, exact = forward
        path = self.folder / f"{model}.layer{layer:03d}.sigma{max(sigma):.6f}.safetensors"
        if path in self.files:
            return
        from safetensors.torch import save_file

        tensors = {name: x.detach().cpu().contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
        tensors["sigma"] = torch.tensor(sigma[: q.shape[0]], dtype=torch.float64)
        tensors["grid"] = torch.tensor(grid)
        metadata = {
            "format": RECORD_FORMAT, "layer": str(layer), "model": model, "tile": self.tile,
            "text_len": str(q.shape[1] - math.prod(grid)), "text_position": text_position,
            "exact": ",".join(map(str, exact)),
        }  # fmt: skip
        save_file(tensors, path, metadata=metadata)
        self.files.append(path)

    @property
    def missed(self) -> list[float]:
        """Targets that no forward of any model has met so far, highest first."""
        if self.pending is None:
            return []
        return [target for target in self.pending if all(target in left for left in self._pending_of.values())]

    def stop(self) -> list[Path]:
        """Stop recording; returns the files written. Warns about targets that no step met."""
        self._on_stop(self)
        if self.missed:
            met = f"the lowest sigma was {self._lowest:g}" if self._pending_of else "no forward ran"
            warnings.warn(
                f"fpsattention.record: sigmas {', '.join(f'{target:g}' for target in self.missed)} were met by no step ({met}): a target "
                "is met by the first step at or below it",
                stacklevel=2,
            )
        return self.files

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
