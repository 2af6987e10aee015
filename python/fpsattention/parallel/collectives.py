"""The collectives of this package: torch.distributed's all-to-all and all-gather, with bytes counted and errors that say what to do.

Everything travels as bytes, so that one call carries tensors of several dtypes, and FP8 goes wherever bytes go.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..errors import ConfigError

_COUNTERS: list[Counter[str]] = []
_AGREEMENT_BYTES = 256
_agreed: dict[Any, set[bytes]] = {}  # signatures by group, where the group has no CPU backend


@contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Bytes that this process sends to *other* ranks meanwhile, by what they are ("qkv", "out", "statistics", "gradients", ...)."""
    counter: Counter[str] = Counter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def _count(what: str, sent: int) -> None:
    for counter in _COUNTERS:
        counter[what] += sent


def group_of(mesh: Any, where: str = "parallel") -> dist.ProcessGroup:
    """The process group of a 1-D mesh, or the group itself.

    Raises:
        ConfigError: another type, a mesh of several dimensions, or no process group is initialized.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            f"fpsattention.{where}: torch.distributed is not initialized, expected a process group: start with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or ()
            raise ConfigError(
                f"fpsattention.{where}: mesh has {mesh.ndim} dimensions {tuple(names)}, expected one: pass mesh['sp'] or its like"
            )
        return mesh.get_group()
    if mesh is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    raise ConfigError(
        f"fpsattention.{where}: mesh is a {type(mesh).__name__}, expected a 1-D DeviceMesh or a ProcessGroup"
    )


@contextmanager
def _explained(what: str, group: dist.ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistBackendError and DistNetworkError are RuntimeErrors
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(
            f"fpsattention.parallel: exchange of {what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)} ({first}): "
            "another rank ended, is stuck, or took another path; the timeout is that of init_process_group(timeout=...)"
        ) from error


class Pending:
    """An exchange on its way: :meth:`wait` gives what came, one flat uint8 tensor per rank."""

    def __init__(self, received: Tensor, sizes: Sequence[int], work: Any, what: str, group: dist.ProcessGroup):
        self._received, self._sizes, self._work, self._what, self._group = received, sizes, work, what, group

    def wait(self) -> list[Tensor]:
        """Blocks the host (gloo) or the current stream (NCCL)."""
        if self._work is not None:
            with _explained(self._what, self._group):
                self._work.wait()
        return list(self._received.split(list(self._sizes)))


def exchange(
    chunks: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup, what: str, wait: bool = True
) -> Pending:
    """All-to-all of flat uint8 tensors: ``chunks[r]`` goes to rank r, and ``sizes[r]`` bytes come from it.

    Raises:
        RuntimeError: the transport failed, e.g. because a rank died.
    """
    rank = dist.get_rank(group)
    sent = [chunk.numel() for chunk in chunks]
    _count(what, sum(sent) - sent[rank])
    source = torch.cat(list(chunks))
    received = source.new_empty(sum(sizes))
    with _explained(what, group):
        work = dist.all_to_all_single(received, source, list(sizes), sent, group=group, async_op=not wait)
    return Pending(received, sizes, work if not wait else None, what, group)


def all_gather(x: Tensor, group: dist.ProcessGroup, what: str) -> list[Tensor]:
    """``x`` of every rank: equal shapes."""
    flat = to_bytes(x)
    size = dist.get_world_size(group)
    _count(what, flat.numel() * (size - 1))
    parts = [torch.empty_like(flat) for _ in range(size)]
    with _explained(what, group):
        dist.all_gather(parts, flat, group=group)
    return [from_bytes(part, tuple(x.shape), x.dtype) for part in parts]


def to_bytes(x: Tensor) -> Tensor:
    """Flat uint8 view of (a contiguous copy of) ``x``."""
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def from_bytes(flat: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`to_bytes`. Copies where the bytes do not lie on a multiple of the dtype's size."""
    if flat.numel() == 0:
        return flat.new_empty(tuple(shape), dtype=dtype)
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(tuple(shape))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def pack(*tensors: Tensor) -> Tensor:
    """Several tensors as one flat uint8 tensor."""
    return torch.cat([to_bytes(x) for x in tensors])


def unpack(flat: Tensor, *parts: tuple[Sequence[int], torch.dtype]) -> list[Tensor]:
    """The tensors of :func:`pack`, by shapes and dtypes."""
    sizes = [num_bytes(shape, dtype) for shape, dtype in parts]
    pieces = flat.split(sizes)
    return [from_bytes(piece, shape, dtype) for piece, (shape, dtype) in zip(pieces, parts, strict=True)]


def agree(signature: str, group: dist.ProcessGroup, device: torch.device) -> None:
    """Make sure that all ranks are about to do the same.

    Where the group has a CPU backend ("gloo", or torch's default "cpu:gloo,cuda:nccl") this is asked every time. On NCCL alone, where reading the
    answer would wait for the device, each signature is asked once.

    Raises:
        ConfigError: on every rank, with what two of them say.
    """
    text = signature.encode("ascii", "replace")
    mine = (hashlib.sha256(text).hexdigest()[:16].encode() + text)[:_AGREEMENT_BYTES].ljust(_AGREEMENT_BYTES)
    on_cpu = device.type == "cpu" or _has_cpu_backend(group)
    known = _agreed.setdefault(group.group_name, set())
    if not on_cpu and mine in known:
        return
    message = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    answers = all_gather(message if on_cpu else message.to(device), group, "agreement")
    texts = [bytes(answer.tolist()) for answer in answers]
    for rank, other in enumerate(texts):
        if other != texts[0]:
            raise ConfigError(
                f"fpsattention.parallel: ranks differ: rank 0 has {texts[0][16:].decode().strip()}; rank {rank} has "
                f"{other[16:].decode().strip()}, expected the same on all: give every rank of the group the same inputs"
            )
    known.add(mine)


def _has_cpu_backend(group: dist.ProcessGroup) -> bool:
    return "gloo" in str(dist.get_backend_config(group)) or "mpi" in str(dist.get_backend_config(group))
