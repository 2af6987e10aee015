"""Tensors that are kept must be ordinary ones, whatever the caller is in the middle of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Inside: no inference mode, no default device, no fake or traced tensors, no gradients.

    A table built during a validation in ``torch.inference_mode()``, or while a model is exported, serves the training step after it.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), _disable_current_modes():
        yield
