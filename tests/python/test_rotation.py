"""The Hadamard rotation: orthogonal, exact in the scores, differentiable, and worth it where single values are outliers."""

import pytest
import torch

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.ops import reference
from fpsattention.ops.rotation import hadamard, rotate

GRID = (2, 13, 11)


@pytest.mark.parametrize("n", [1, 2, 32, 128])
def test_the_matrix(n):
    matrix = hadamard(n, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix.abs(), torch.full((n, n), n**-0.5))
    torch.testing.assert_close(matrix @ matrix, torch.eye(n), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_scores_stay_and_outliers_spread(dim):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 7, dim, generator=generator) for _ in range(2))
    torch.testing.assert_close(rotate(q) @ rotate(k).mT, q @ k.mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rotate(rotate(q)), q, rtol=1e-5, atol=1e-5)
    spike = torch.zeros(dim)
    spike[3] = 8.0
    block = dim & -dim
    assert rotate(spike).abs().max() == pytest.approx(8.0 / block**0.5)
    assert rotate(q.bfloat16()).dtype == torch.bfloat16


def attention(q, k, v, **options):
    return fps.attention(q, k, v, GRID, **options)


@pytest.mark.parametrize("dim", [64, 80, 96])
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
def test_attention_and_its_gradients(dim, tensor_layout):
    """Rotated by hand is the same, bit for bit, and the gradients are those of the tensors before the rotation."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 286, 2, dim) if tensor_layout == "NHD" else (1, 2, 286, dim)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*ours, tensor_layout=tensor_layout, hadamard=True)
    out.backward(grad)
    by_hand = [x.clone().requires_grad_() for x in (q, k, v)]
    padded = [torch.nn.functional.pad(x, (0, {64: 0, 80: 16, 96: 0}[dim])) for x in by_hand]
    wanted = attention(
        rotate(padded[0]), rotate(padded[1]), padded[2], tensor_layout=tensor_layout, scale=dim**-0.5
    )[..., :dim]  # fmt: skip
    wanted.backward(grad)
    assert torch.equal(out, wanted)
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    # lse does not feel an orthogonal rotation; its error is that of the scores (test_attention.py).
    _, lse = attention(q, k, v, tensor_layout=tensor_layout, hadamard=True, return_lse=True)
    _, plain = attention(q, k, v, tensor_layout=tensor_layout, return_lse=True)
    torch.testing.assert_close(lse, plain, rtol=0, atol=0.05)


def test_it_pays_where_single_values_are_outliers():
    """docs/numerics.md: 0.088 to 0.063 at D = 64, scales per block. An eighth less here, with fewer keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 286, 2, 64, generator=generator) for _ in range(3))
    for x in (q, k):
        x += (torch.rand(x.shape, generator=generator) < 1e-3) * 10.0 * torch.randn(x.shape, generator=generator)
    exact = reference.attention_fp64(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    plain, rotated = (
        float((attention(q, k, v, granularity="block", hadamard=flag) - exact).abs().sum() / exact.abs().sum()) for flag in (False, True)
    )  # fmt: skip
    assert rotated < 0.92 * plain


def test_k_mean_is_rotated_with_k():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 286, 1, 64, generator=generator) for _ in range(3))
    given = attention(q, k, v, hadamard=True, k_mean=k.mean(1))
    torch.testing.assert_close(given, attention(q, k, v, hadamard=True), rtol=0, atol=0.05)
    shifted = attention(q, k + 50.0, v, hadamard=True, k_mean=(k + 50.0).mean(1))
    torch.testing.assert_close(shifted, given, rtol=0, atol=0.05)  # 50 would be coarse if it were not subtracted


@torch.no_grad()
@pytest.mark.slow
def test_a_level_of_a_schedule(monkeypatch):
    """Rotated by hand before a level that does not rotate: the same bits; beside a level that does not, a launch of its own."""
    pytest.importorskip("diffusers")
    import tiny_wan

    from fpsattention.integrations import site

    model, times = tiny_wan.transformer(), [900.0, 100.0]
    window = {"precision": "fp8", "granularity": "block", "window": [1, 1, 2]}
    topk = {"precision": "fp8", "granularity": "block", "pattern": {"name": "topk_mean", "ratio": 0.5}}

    def run(*levels):
        names = [f"level{i}" for i in range(len(levels))]
        phases = [{"sigma": [1.0, 0.5], "level": names[0]}, {"sigma": [0.5, 0.0], "level": names[-1]}]
        made = fps.Schedule.from_dict({
            "format": "fpsattn-schedule/3", "tile": tiny_wan.TILE, "levels": dict(zip(names, levels, strict=True)), "phases": phases,
        })  # fmt: skip
        assert fps.Schedule.from_dict(made.to_dict()) == made
        with fps.apply(model, made):
            return tiny_wan.run(model, times)

    plain, rotated = {}, {}
    for name, level in (("window", window), ("topk", topk)):
        plain[name], rotated[name] = run(level), run({**level, "hadamard": True})
        assert not torch.equal(plain[name], rotated[name])
    both = run({**window, "hadamard": True}, window)
    assert torch.equal(both, torch.cat([rotated["window"][:1], plain["window"][1:]]))

    def by_hand(attend):
        def run(q, k, v, lists, **options):
            assert not options.pop("hadamard")
            return attend(rotate(q), rotate(k), v, lists, **options)

        return run

    for name in ("attend", "attend_selected"):
        monkeypatch.setattr(site, name, by_hand(getattr(site, name)))
    for name, level in (("window", window), ("topk", topk)):
        assert torch.equal(run(level), rotated[name])


def test_errors():
    q = torch.randn(1, 286, 1, 64)
    with pytest.raises(ConfigError, match="hadamard 1, expected True or False"):
        attention(q, q, q, hadamard=1)
    rope = fps.Rope(torch.ones(286, 32), torch.zeros(286, 32))
    with pytest.raises(UnsupportedError, match="hadamard was asked for with norm or rope"):
        attention(q, q, q, hadamard=True, rope=rope)
