"""What runs right now, per thread: the forward that a transformer is in, and the attention module whose core is being called.

Nothing here is shared between threads, and nothing outlives its forward: requests that share one transformer each see their own
level, and an attention that runs outside of a forward of its transformer finds nothing and says so. ``torch.compile`` reads
these objects through a global, not through a module, so the sizes of their tensors may become dynamic.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .forward import Forward
    from .prepared import Raw
    from .site import Site


class _Current(threading.local):
    def __init__(self) -> None:  # runs in every thread; compiled code relies on both being there
        self.forward: Forward | None = None
        self.site: Site | None = None
        self.raw: Raw | None = None  # what q and k lack where that site calls its core


CURRENT = _Current()
