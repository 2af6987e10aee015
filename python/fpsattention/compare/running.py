"""One method in one pipeline: every self-attention goes through it, and what it attended is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..integrations.core_calls import CoreCall
from ..integrations.state import CURRENT
from ..layout.tiles import Int3, plan
from ..schedule import Level, Phase, Schedule
from .methods import Context, Method


class Counted:
    """Attended pairs and FLOPs of a run."""

    def __init__(self) -> None:
        self.calls = 0
        self.densities = 0.0
        self.flops = 0.0  # 4 pairs D of every head: what the visited pairs cost
        self.dense_flops = 0.0
        self.ran: set[str] = set()  # implementations, in words

    def add(self, density: float, q: Tensor) -> None:
        """A call with q ``(B, H, S, D)``."""
        dense = 4.0 * q.shape[0] * q.shape[1] * q.shape[2] ** 2 * q.shape[3]
        self.calls += 1
        self.densities += density
        self.flops += density * dense
        self.dense_flops += dense

    @property
    def density(self) -> float:
        """Of all calls, by their pairs."""
        return self.flops / self.dense_flops if self.dense_flops else float("nan")


def dense_schedule(tile: Int3 | None) -> Schedule:
    """The model's own attention at every sigma."""
    return Schedule({"dense": Level("dense", precision="bf16")}, (Phase(1.0, 0.0, "dense"),), tile=tile)


@contextmanager
def attention_by(pipe: Any, method: Method, tile: Int3 | None) -> Iterator[Counted]:
    """Within, the self-attentions of ``pipe`` run ``method``; on leaving, the model is as it was."""
    import fpsattention as fps

    counted = Counted()
    with fps.apply(pipe, dense_schedule(tile)) as handle:
        hooks = []
        for installation in handle.installations:
            sigma: list[Any] = []  # of the forward, and the trajectory of its run
            hooks.append(
                installation.transformer.register_forward_pre_hook(_note(installation, sigma), with_kwargs=True)
            )
            for site in installation.sites:
                site.attend = _attend(site, method, tile, sigma, counted)  # type: ignore[method-assign]
        try:
            yield counted
        finally:
            for hook in hooks:
                hook.remove()


def _note(installation: Any, sigma: list[Any]) -> Any:
    def before(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        geometry = installation._geometry(transformer, args, kwargs)
        timestep = installation.reader.per_sample(geometry.timestep, geometry.latents.shape[0])
        sigmas = set(installation.reader.on_host(timestep))
        if len(sigmas) != 1:
            raise ConfigError(
                f"fpsattention.compare: samples of one batch at sigmas {sorted(sigmas)}, expected one sigma"
            )
        sigma[:] = [*sigmas, installation.reader.trajectory(timestep)]

    return before


def _attend(site: Any, method: Method, tile: Int3 | None, sigma: list[Any], counted: Counted) -> Any:
    def attend(core: CoreCall) -> Tensor:
        forward = CURRENT.forward
        assert forward is not None  # the hooks of apply have run
        forward.call(site.group, core.q.shape[1], core.q.device)  # closes an open text length
        forward.executed[site.layer] += 1
        tokens = forward.tokens
        assert tokens is not None
        layout = plan(tokens.grid, tile, tokens.text_len, tokens.text_position if tokens.text_len else "suffix")
        context = Context(layout, site.layer, sigma[0], core.scale, sigma[1], tokens.exact)
        q, k, v = (x.transpose(1, 2) for x in (core.q, core.k, core.v))
        if method.is_dense(context):
            counted.add(1.0, q)
            return core.dense(core.q, core.k, core.v)
        mask = method.mask(q, k, v, context)
        counted.add(mask.density, q)
        counted.ran.add(method.implementation(q, mask)[1])
        return method.attention(q, k, v, mask, context).transpose(1, 2)

    return attend
