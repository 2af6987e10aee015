"""What a tuning run keeps on disk, so that it can be stopped at any time and goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.metrics import jsonable
from ..errors import ConfigError

# Elements of a tensor that enter a model's hash: all of a small one, evenly spaced ones of a large one
_HASHED = 65_536


#: What tuning writes beside ``state.json`` and reads again.
WRITTEN = ("schedule.json", "tune.json", "runs")


class State:
    """``state.json`` in a folder: a mapping that is written, whole, whenever something is put into it.

    Args:
        key: of everything that decides the results; a folder of another key is emptied of what tuning wrote.

    Raises:
        ConfigError: the folder holds files of these names that are not tuning's.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.path = folder, folder / "state.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.data = self._read()
        self.resumed = self.data.get("key") == key
        if not self.resumed:
            for path in (folder / name for name in WRITTEN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self.data = {"key": key}
            self._write()

    def _read(self) -> dict[str, Any]:
        """What an earlier run left; nothing where there was none."""
        if self.path.exists():
            try:
                data = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"fpsattention.tune: '{self.path}' is not JSON: {error}") from error
            if not isinstance(data, dict) or "key" not in data:
                raise ConfigError(f"fpsattention.tune: '{self.path}' is not of tuning, expected another folder")
            return data
        if foreign := [name for name in WRITTEN if (self.folder / name).exists()]:
            raise ConfigError(
                f"fpsattention.tune: '{self.folder}' holds {foreign[0]} and no state.json, expected an empty folder or one of tuning"
            )
        return {}

    def get(self, *path: str) -> Any:
        """What is kept there, or None."""
        at: Any = self.data
        for name in path:
            at = at.get(name) if isinstance(at, dict) else None
        return at

    def put(self, value: Any, *path: str) -> None:
        """Keep ``value``."""
        at = self.data
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = jsonable(value)
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.data)


def write_json(path: Path, value: Any) -> None:
    """The file is whole at any time."""
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(jsonable(value)) + "\n", encoding="utf-8")
    part.rename(path)


def model_hash(transformers: Iterable[torch.nn.Module]) -> str:
    """Of names, shapes and weights: all of a tensor's elements up to ``_HASHED``, evenly spaced ones beyond."""
    digest = hashlib.sha256()
    for transformer in transformers:
        for name, tensor in sorted(transformer.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def call_hash(call: Mapping[str, Any]) -> str:
    """Of the arguments of a pipeline."""
    digest = hashlib.sha256()
    for name, value in sorted(call.items()):
        digest.update(f"{name}=".encode())
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(1, flat.numel() // _HASHED)]
    if flat.is_floating_point():
        flat = flat.float()
    return flat.cpu().contiguous().numpy().tobytes()
