"""What runs right now, per thread: the forward that a transformer is in, and the attention module whose core is being called.

Nothing here is shared between threads, and nothing outlives its forward: requests that share one transformer each see their own
level, and an attention that runs outside of a forward of its transformer finds nothing and says so. ``torch.compile`` reads
these objects through a global, not through a module, so the sizes of their tensors may become dynamic.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .forward import Forward
    from .prepared import Raw
    from .site import Site


class _Current(threading.local):
    """``forward``; ``site``; ``raw``: what q and k lack where that site calls its core; ``taken``: the core was told.

    Items of a dict: after a ``torch.cond``, Dynamo (2.13) reads attributes of an object as they were before it.
    """

    def __init__(self) -> None:  # runs in every thread; compiled code relies on all being there
        self.now: dict[str, Any] = {"forward": None, "site": None, "raw": None, "taken": False}

    @property
    def forward(self) -> Forward | None:
        return self.now["forward"]  # type: ignore[no-any-return]

    @forward.setter
    def forward(self, value: Forward | None) -> None:
        self.now["forward"] = value

    @property
    def site(self) -> Site | None:
        return self.now["site"]  # type: ignore[no-any-return]

    @site.setter
    def site(self, value: Site | None) -> None:
        self.now["site"] = value

    @property
    def raw(self) -> Raw | None:
        return self.now["raw"]  # type: ignore[no-any-return]

    @raw.setter
    def raw(self, value: Raw | None) -> None:
        self.now["raw"], self.now["taken"] = value, False

    @property
    def taken(self) -> bool:
        return self.now["taken"]  # type: ignore[no-any-return]

    @taken.setter
    def taken(self, value: bool) -> None:
        self.now["taken"] = value


CURRENT = _Current()
