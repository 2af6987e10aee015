"""Adapters to other libraries. Nothing heavy is imported here: ``apply`` imports diffusers when it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffusers import apply

__all__ = ["apply"]


def __getattr__(name: str) -> Any:
    if name != "apply":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .diffusers import apply

    return apply
