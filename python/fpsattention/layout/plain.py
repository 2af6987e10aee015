"""State that outlives a call: ordinary tensors, made once, under a lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made inside are ordinary ones, whatever the caller is in.

    No inference tensors (they cannot be saved for a backward), no fake or functional ones, no wrappers of ``torch.func``, nothing on
    a default device. Dtypes are always said where tensors are made, so a default dtype does not matter.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.device("cpu"),
        torch.no_grad(),
    ):
        yield


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """On a GPU: the default stream, so that memory made inside belongs to it and nobody else's stream can be given it early."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.default_stream(device)):
        yield


class Cache:
    """Values by key, each made once, as plain tensors. Safe between threads; a copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``; ``make()`` where there is none yet."""
        with self._lock:
            if key not in self._values:
                with plain_tensors():
                    self._values[key] = make()
            return self._values[key]

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


def is_fake(tensor: Tensor) -> bool:
    """True for tensors without memory of their own (FakeTensor, functional wrappers): their values cannot be read."""
    return type(tensor) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """Marks a function whose result ``torch.compile`` may take as a constant: what ``torch.compiler.assume_constant_result`` does,
    without its import of the compiler, which takes longer than all of this package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
