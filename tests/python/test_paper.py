"""Paper mode: S(t) by steps, truncated windows, scale groups of several tiles, no K smoothing, trainable."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError, UnsupportedError, patterns
from fpsattention.compare import numerics
from fpsattention.layout.masks import dense_mask
from fpsattention.ops.attend import attend
from fpsattention.paper import DEFAULT_PHASES, PHASES, PaperMode, PaperPhase

SMALL = PaperMode(
    0.2, 0.8, tile=(2, 3, 4),
    phases={"coarse": PaperPhase((1, 1, 1), (4, 6, 8)), "fine": PaperPhase((3, 3, 3), (2, 3, 4)), "intermediate": PaperPhase((3, 3, 1), (4, 3, 4))},
)  # fmt: skip
GRID = (5, 8, 14)


@pytest.mark.parametrize(("alpha1", "alpha2"), [(0.2, 0.8), (0.0, 1.0), (0.33, 0.33), (1.0, 1.0)])
@pytest.mark.parametrize("num_steps", [1, 6, 50])
def test_phases_are_those_of_the_formula(alpha1, alpha2, num_steps):
    mode = PaperMode(alpha1, alpha2)
    for t in range(1, num_steps + 1):
        want = "coarse" if t <= alpha1 * num_steps else "fine" if t <= alpha2 * num_steps else "intermediate"
        assert mode.phase(t, num_steps) == want


def test_published_numbers():
    mode = PaperMode(0.2, 0.8)
    assert mode.tile == (6, 8, 8) and mode.layout((21, 45, 80)).tile_grid == (4, 6, 10)
    assert {phase.granularity for phase in DEFAULT_PHASES.values()} == {(6, 8, 8), (12, 16, 16), (24, 32, 32)}
    densities = {name: mode.mask((21, 45, 80), name).density for name in PHASES}
    assert densities["coarse"] < densities["intermediate"] < densities["fine"]
    assert densities["intermediate"] == pytest.approx(
        0.083, abs=0.003
    )  # (6, 6, 1): all of 4, 30 of 36, 1 of 10, more where tiles are whole


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_attention_of_a_phase(phase):
    """Against FP64 under the truncated window; scales are shared by the group, K is not smoothed; gradients flow."""
    generator = torch.Generator().manual_seed(0)
    tokens = GRID[0] * GRID[1] * GRID[2]
    q, k, v = (torch.randn(1, tokens, 2, 64, generator=generator).requires_grad_() for _ in range(3))
    out = SMALL.attention(q, k, v, GRID, phase)
    mask = SMALL.mask(GRID, phase).to_token_mask()
    places = [(t // 2, h // 3, w // 4) for t in range(5) for h in range(8) for w in range(14)]
    window = SMALL.phases[phase].window
    for i in (0, 37, 300, tokens - 1):
        near = [all(abs(a - b) <= s / 2 for a, b, s in zip(places[i], other, window, strict=True)) for other in places]
        assert mask[0, 0, i].tolist() == near
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), mask)
    error = (out.transpose(1, 2) - want).abs().sum() / want.abs().sum()
    assert error < 0.08
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = torch.autograd.grad(want.square().sum(), (q, k, v))
    for a, b in zip(gradients, exact, strict=True):
        assert (a - b).abs().sum() / b.abs().sum() < 0.2

    # Without smoothing a constant in K costs accuracy; with it, it would not.
    shifted = SMALL.attention(q, k + 30.0, v, GRID, phase).transpose(1, 2)
    assert (shifted - want).abs().sum() / want.abs().sum() > 2 * error


@pytest.mark.slow
def test_coarser_groups_have_coarser_scales():
    generator = torch.Generator().manual_seed(0)
    tokens = GRID[0] * GRID[1] * GRID[2]
    q, k, v = (torch.randn(1, tokens, 2, 64, generator=generator) for _ in range(3))
    q[:, 0] *= 100  # one loud token takes the resolution of its whole group away
    one = PaperMode(0.2, 0.8, (2, 3, 4), {**SMALL.phases, "coarse": PaperPhase((9, 9, 9), (2, 3, 4))})
    many = PaperMode(0.2, 0.8, (2, 3, 4), {**SMALL.phases, "coarse": PaperPhase((9, 9, 9), (24, 32, 32))})
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    errors = [(m.attention(q, k, v, GRID, "coarse") - exact)[:, 1:].abs().mean().item() for m in (one, many)]
    assert errors[1] > errors[0]


def test_schedule_for_the_trainer():
    diffusers = pytest.importorskip("diffusers")
    mode = PaperMode(0.2, 0.8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    schedule = mode.schedule(scheduler, 50)
    assert schedule.to_steps(scheduler, 50) == [mode.phase(t, 50) for t in range(1, 51)]
    assert schedule.tile == (6, 8, 8) and schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PaperMode(0.8, 0.2), r"alphas 0\.8, 0\.2, expected 0 <= alpha1 <= alpha2 <= 1"),
        (lambda: PaperMode(0.2, 0.8, precision="int8"), r"precision 'int8', expected 'fp8' or 'paper'"),
        (lambda: PaperMode(0.2, 0.8, phases={}), r"phases \[\], expected coarse, fine, intermediate"),
        (lambda: PaperMode(0.2, 0.8).phase(0, 6), r"step 0 of 6, expected 1 to 6"),
        (lambda: PaperMode(0.2, 0.8).mask((3, 9, 9), "late"), r"phase 'late', expected one of coarse"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


# Probabilities as published -------------------------------------------------------------------------------------------------


def published(q, k, v, mask, scale):
    """Attention of one head, q, k, v ``[S, D]``, in plain PyTorch: rounded values pass gradients as they are, dS has the rounded P."""
    layout = mask.layout
    places = layout.token_of_slot.view(-1, 128)

    def rounded(x, group):
        s = x.detach()[group].abs().max() / 448
        return (x[group] / s).detach().to(torch.float8_e4m3fn).float() * s

    groups = [layout.token_of_slot[layout.tile_of_block.repeat_interleave(128) == t] for t in range(layout.num_tiles)]
    groups = [g[g >= 0].long() for g in groups]
    near = [torch.zeros_like(x) for x in (q, k)]
    for x, values in zip((q, k), near, strict=True):
        for group in groups:
            values[group] = rounded(x, group)
    near.append(torch.stack([rounded(v[:, c], slice(None)) for c in range(v.shape[1])], 1))
    q, k, v = (x + (y - x).detach() for x, y in zip((q, k, v), near, strict=True))
    rows = []
    for tile, group in enumerate(groups):
        blocks = mask.kv_indices[0, 0, tile, : mask.kv_num_blocks[0, 0, tile]].tolist()
        keys = [places[b][places[b] >= 0].long() for b in blocks]
        scores = [scale * q[group] @ k[key].T for key in keys]
        running = torch.stack([s.detach().max(-1).values for s in scores]).cummax(0).values
        p, values = [], []
        for s, m, key in zip(scores, running, keys, strict=True):
            exact = torch.exp(s - running[-1].unsqueeze(-1))
            code = (448 * torch.exp(s.detach() - m.unsqueeze(-1))).to(torch.float8_e4m3fn).float() / 448
            p.append((exact, code * torch.exp(m - running[-1]).unsqueeze(-1) / exact.detach()))
            values.append(v[key])
        exact, ratio = (torch.cat(x, -1) for x in zip(*p, strict=True))
        p = exact * ratio
        total = p.sum(-1) + (exact.sum(-1) - p.sum(-1)).detach()
        rows.append(p @ torch.cat(values) / total.unsqueeze(-1))
    return torch.cat(rows)[torch.cat(groups).argsort()]


def test_published_probabilities_and_their_gradients():
    layout = fps.plan((3, 5, 14), (2, 3, 7), 3)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, layout.num_tokens, 64, generator=generator).requires_grad_() for _ in range(3))
    mask = patterns.topk_mean(q, k, layout, ratio=0.6)
    options = {"precision": "paper", "smooth_k": False, "tensor_layout": "HND", "scale": 0.3}
    out, lse = attend(q, k, v, mask, **options)
    want = published(q[0, 0], k[0, 0], v[0, 0], mask, 0.3)
    # A score whose last bit differs may round P to the other neighbour, 1/16 away: seen in few of them.
    torch.testing.assert_close(out[0, 0], want, rtol=1e-3, atol=1e-3)
    assert (out[0, 0] - want).abs().sum() / want.abs().sum() < 1e-4
    upstream = torch.randn(out.shape, generator=generator)
    for a, b in zip(
        *(torch.autograd.grad((x * upstream[0, 0]).sum(), (q, k, v)) for x in (out[0, 0], want)), strict=True
    ):
        assert (a - b).abs().sum() / b.abs().sum() < 1e-3
    harness, _ = numerics.blockwise_attention(q.detach(), k.detach(), v.detach(), mask, numerics.PAPER, scale=0.3)
    assert (out - harness).abs().sum() / harness.abs().sum() < 1e-4
    kernels, of_kernels = attend(q, k, v, mask, **{**options, "precision": "fp8"})
    assert 1e-3 < (out - kernels).abs().sum() / out.abs().sum() < 0.05  # another rounding of P
    torch.testing.assert_close(lse, of_kernels, rtol=0, atol=1 / 16)  # theirs sums rounded P, each off by 1/16 at most
    torch.testing.assert_close(attend(q, k, v, mask, **options, backend="reference")[0], out, rtol=0, atol=0)


def test_published_probabilities_under_scale_groups_and_in_levels():
    """``PaperMode(precision="paper")`` under its scale groups, and as a level of a schedule."""
    mode = dataclasses.replace(SMALL, precision="paper")
    generator = torch.Generator().manual_seed(0)
    shape = (1, GRID[0] * GRID[1] * GRID[2], 2, 64)
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(3))
    out = mode.attention(q, k, v, GRID, "coarse")
    of_kernels = SMALL.attention(q, k, v, GRID, "coarse")
    assert 1e-3 < (out - of_kernels).abs().sum() / of_kernels.abs().sum() < 0.05
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in torch.autograd.grad(out.square().sum(), (q, k, v)))

    tiny_wan = pytest.importorskip("tiny_wan")
    model, seen = tiny_wan.transformer(num_layers=1), []
    window = {"precision": "paper", "pattern": {"name": "sliding_tile", "window": [1, 1, 1], "border": "truncate"}}
    data = {
        "format": "fpsattn-schedule/3",
        "tile": tiny_wan.TILE,
        "levels": {"l": window},
        "phases": [{"sigma": [1.0, 0.0], "level": "l"}],
    }
    assert fps.Schedule.from_dict(fps.Schedule.from_dict(data).to_dict()).levels["l"].precision == "paper"
    with torch.no_grad(), fps.apply(model, data) as handle:
        handle.installations[0].sites[0].observers.append(lambda name, *tensors: seen.extend(tensors))
        tiny_wan.run(model, [500.0])
        q, k, v, got = seen
        mask = patterns.sliding_tile(fps.plan(tiny_wan.GRID, tiny_wan.TILE), window=(1, 1, 1), border="truncate")
        want = fps.attention(q, k, v, tiny_wan.GRID, block_mask=mask, precision="paper", smooth_k=False)
        assert torch.equal(got, want)
        with pytest.raises(UnsupportedError, match="level 'l' has precision 'paper'.*expected this model eager"):
            torch.compile(model, backend="eager")(**tiny_wan.inputs([500.0]))
    torch._dynamo.reset()


def test_published_probabilities_are_refused_by_the_kernels(monkeypatch):
    q, k, v = torch.randn(3, 1, 60, 2, 64)
    monkeypatch.setattr("fpsattention.ops.attend.resolve_backend", lambda *_: "sm90")
    with pytest.raises(UnsupportedError, match="'paper' on the sm_90a kernels.*use precision='fp8'.*CPU tensors"):
        attend(q, k, v, dense_mask(fps.plan((3, 4, 5))), precision="paper")
