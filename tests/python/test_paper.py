"""Paper mode: S(t) by steps, truncated windows, scale groups of several tiles, no K smoothing, trainable."""

from __future__ import annotations

import pytest
import torch

from fpsattention import ConfigError
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
        (lambda: PaperMode(0.8, 0.2), r"alphas 0\.8, 0\.2, wanted 0 <= alpha1 <= alpha2 <= 1"),
        (lambda: PaperMode(0.2, 0.8, phases={}), r"phases \[\], wanted coarse, fine, intermediate"),
        (lambda: PaperMode(0.2, 0.8).phase(0, 6), r"step 0 of 6, wanted 1 to 6"),
        (lambda: PaperMode(0.2, 0.8).mask((3, 9, 9), "late"), r"phase 'late', wanted one of coarse"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
