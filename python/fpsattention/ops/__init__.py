"""``torch.ops.fpsattn.*``: importing this package registers schemas, kernels, fakes and derivatives (:mod:`.core`)."""

from . import core  # noqa: F401
