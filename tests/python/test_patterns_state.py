"""Patterns with state or a permutation of their own: refreshed masks, clusters (SVG 2), coresets (VORTA)."""

from __future__ import annotations

import threading

import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError, patterns

FP8 = 0.07  # relative L1 of FP8 attention of normal inputs at D = 64 (0.056 at D = 128 and 4096 keys; short rows average less)


def tensors(layout, heads=2, dim=64, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, layout.num_tokens, dim, generator=generator) for _ in range(count)]


def masked(q, k, v, mask):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def relative_l1(out, want):
    return float((out - want).abs().sum() / want.abs().sum())


# Refresh -----------------------------------------------------------------------------------------------------------------


def test_refresh_builds_at_every_third_different_step():
    layout = fps.plan((4, 8, 16), (2, 8, 8))
    q, k = tensors(layout, count=2)
    built = []

    def pattern(q, k, layout, **_):
        built.append(float(q.flatten()[0]))
        return patterns.topk_mean(q, k, layout, ratio=0.5)

    refresh = patterns.Refresh(pattern, every=3)
    masks = {}
    for step, sigma in enumerate([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]):
        for layer in range(2):
            first = refresh(layer, sigma, q + step, k, layout)
            assert refresh(layer, sigma, q - 1, k, layout) is first  # guidance: a second forward of the same step
            masks[layer, step] = first
    assert len(built) == 2 * 3  # steps 0, 3, 6
    for layer in range(2):
        assert masks[layer, 0] is masks[layer, 1] is masks[layer, 2]
        assert masks[layer, 3] is masks[layer, 4] is masks[layer, 5]
        assert len({id(masks[layer, step]) for step in (0, 3, 6)}) == 3
    assert masks[0, 0] is not masks[1, 0]
    other = fps.plan((4, 8, 16), (4, 8, 4))
    assert refresh(0, 0.4, q, k, other).layout is other  # another layout is built for
    refresh.clear()
    assert refresh(1, 0.4, q, k, layout) is not masks[1, 6]


def test_refresh_keeps_threads_apart():
    layout = fps.plan((4, 8, 16), (2, 8, 8))
    q, k = tensors(layout, count=2)
    refresh = patterns.Refresh(patterns.get("topk_mean", ratio=0.5), every=100)
    want = [patterns.topk_mean(q * sign, k, layout, ratio=0.5).kv_indices for sign in (1, -1)]
    assert not torch.equal(*want)
    barrier, wrong = threading.Barrier(2), []

    def run(which):
        for step in range(20):
            barrier.wait()
            mask = refresh("layer", step, q * (1, -1)[which], k, layout)
            if not torch.equal(mask.kv_indices, want[which]):
                wrong.append((which, step))

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Clusters (Sparse-VideoGen 2) --------------------------------------------------------------------------------------------


def plain_k_means(x, clusters, iterations):
    """Lloyd's algorithm from evenly spaced tokens, one head, token by token."""
    centres = [x[i * len(x) // clusters].clone() for i in range(clusters)]
    for _ in range(iterations):
        labels = [min(range(clusters), key=lambda c, t=t: float((t - centres[c]).square().sum())) for t in x]
        for c in range(clusters):
            members = [t for t, label in zip(x, labels, strict=True) if label == c]
            if members:
                centres[c] = torch.stack(members).mean(0)
    return [min(range(clusters), key=lambda c, t=t: float((t - centres[c]).square().sum())) for t in x], centres


def blobs(layout, count, seed=0, dim=64):
    """Tokens around ``count`` centres, in random order: q, k ``(1, 2, S, dim)``."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, count, dim, generator=generator)
    which = torch.stack([torch.randperm(layout.num_tokens, generator=generator) % count for _ in range(4)])
    noise = 0.15 * torch.randn(2, 2, layout.num_tokens, dim, generator=generator)
    return [(torch.stack([centres[h, which[2 * i + h]] for h in range(2)]) + noise[i])[None] for i in range(2)]


def test_k_means_is_lloyds():
    layout = fps.plan((2, 9, 11))
    x = blobs(layout, 5, dim=16)[0]
    labels, centres = patterns.k_means(x, 5, 4)
    for head in range(2):
        want_labels, want_centres = plain_k_means(x[0, head].double(), 5, 4)
        assert labels[0, head].tolist() == want_labels
        torch.testing.assert_close(centres[0, head].double(), torch.stack(want_centres), rtol=1e-4, atol=1e-4)
    again, _ = patterns.k_means(x, 5, 0, centres)  # from the centroids of the step before
    assert torch.equal(again, labels)


@pytest.mark.parametrize(("grid", "text", "position"), [((3, 9, 17), 0, "suffix"), ((4, 8, 16), 21, "suffix"), ((5, 7, 11), 21, "prefix")])  # fmt: skip
@pytest.mark.slow
def test_svg2_attends_the_chosen_clusters(grid, text, position):
    """Blocks hold every chosen cluster pair; what the op gives under the permutation is attention under those blocks' tokens."""
    layout = fps.plan(grid, None, text, position)
    q, k = blobs(layout, 6)
    v = tensors(layout, count=1)[0]
    clustered = patterns.svg2(q, k, layout, q_clusters=6, k_clusters=7, mass=0.6, min_ratio=0.1, iterations=8)
    first = text if position == "prefix" else 0
    video = torch.arange(first, first + layout.num_video_tokens)
    allowed = torch.zeros(1, 2, layout.num_tokens, layout.num_tokens, dtype=torch.bool)  # by cluster
    for head in range(2):
        q_labels, q_centres = plain_k_means(q[0, head, video].double(), 6, 8)
        k_labels, k_centres = plain_k_means(k[0, head, video].double(), 7, 8)
        sizes = torch.tensor([k_labels.count(c) for c in range(7)])
        scores = torch.stack(q_centres) @ torch.stack(k_centres).T / 8
        weights = (sizes.double() * scores.exp()) / (sizes * scores.exp()).sum(-1, keepdim=True)
        for i in range(6):
            taken, chosen = 0.0, []
            for j in weights[i].argsort(descending=True).tolist():
                if taken >= 0.6:
                    break
                taken += float(weights[i, j])
                chosen.append(j)
            rows, columns = (
                torch.tensor([c in wanted for c in labels]) for labels, wanted in ((q_labels, [i]), (k_labels, chosen))
            )
            allowed[0, head, video[rows][:, None], video[columns]] = True
    texts = torch.tensor([t for t in range(layout.num_tokens) if t not in set(video.tolist())], dtype=torch.long)
    allowed[:, :, texts] = allowed[..., texts] = True
    assert allowed.float().mean() == pytest.approx(clustered.density().selected, abs=1e-6)

    # Which tokens the blocks attend, in the order of the tokens: the rule's, and what shares a block with them.
    in_order = clustered.mask.to_token_mask()
    attended = torch.zeros_like(allowed)
    for head in range(2):
        attended[0, head][clustered.q_order[0, head][:, None], clustered.k_order[0, head]] = in_order[0, head]
    # The lists: a pair of blocks is visited where it holds tokens of a chosen pair of clusters, and only there.
    flat, blocks = clustered.mask.layout, clustered.mask.to_blocks()
    tile_of_place = flat.slot_of_token.long() // 128
    for head in range(2):
        chosen_there = allowed[0, head][clustered.q_order[0, head]][:, clustered.k_order[0, head]]
        pairs = torch.zeros(flat.num_blocks, flat.num_blocks, dtype=torch.bool)
        i, j = chosen_there.nonzero(as_tuple=True)
        pairs[tile_of_place[i], tile_of_place[j]] = True
        assert torch.equal(blocks[0, head], pairs)
    assert attended.float().mean() < 1.0
    assert attended.double().mean().item() == pytest.approx(clustered.density().kernel)
    out = patterns.clustered_attention(q, k, v, clustered)
    assert relative_l1(out, masked(q, k, v, attended)) < FP8
    gradient = torch.autograd.grad(patterns.clustered_attention(q, k, v.requires_grad_(), clustered).sum(), v)[
        0
    ]  # through the permutation, too: columns of the attention sum up to the number of rows
    assert gradient.mean().item() == pytest.approx(1.0, abs=0.02)


def test_svg2_starts_from_the_step_before():
    layout = fps.plan((3, 9, 17))
    q, k = blobs(layout, 6)
    first = patterns.svg2(q, k, layout, q_clusters=6, k_clusters=6, mass=0.5, iterations=10)
    second = patterns.svg2(q, k, layout, q_clusters=6, k_clusters=6, mass=0.5, iterations=0, previous=first)
    assert torch.equal(first.q_order, second.q_order) and torch.equal(first.mask.kv_indices, second.mask.kv_indices)
    with pytest.raises(ConfigError, match=r"svg2: k_clusters 460, expected a whole number, 1 to 459"):
        patterns.svg2(q, k, layout, q_clusters=6, k_clusters=460)


# Coresets (VORTA) --------------------------------------------------------------------------------------------------------


def test_coreset_keeps_the_centre_and_the_least_similar():
    grid, group = (4, 6, 4), (2, 3, 2)
    layout = fps.plan(grid)
    x = tensors(layout, count=1, dim=8)[0]
    coreset = patterns.Coreset(x, grid, group, reduction=0.5)
    raster = torch.arange(96).view(grid)
    for head in range(2):
        centres, others, source = [], [], {}
        for t in range(0, 4, 2):
            for h in range(0, 6, 3):
                for w in range(0, 4, 2):
                    centre = int(raster[t + 1, h + 1, w + 1])
                    rest = [i for i in raster[t : t + 2, h : h + 3, w : w + 2].flatten().tolist() if i != centre]
                    cosine = torch.cosine_similarity(x[0, head, rest], x[0, head, [centre]], dim=-1)
                    rest = [rest[i] for i in cosine.argsort()]
                    centres.append(centre)
                    others += rest[:5]  # int(12 * 0.5) tokens stay
                    source |= {i: centre for i in rest[5:]}
        assert coreset.kept[0, head].tolist() == centres + others
        out = coreset.give(coreset.take(x))[0, head]
        for token in range(96):
            assert torch.equal(out[token], x[0, head, source.get(token, token)])


def test_three_routes_in_one_layer():
    """Heads on different routes, as VORTA mixes them: each equals its own attention."""
    grid = (4, 8, 16)
    layout = fps.plan(grid, (2, 8, 8))
    q, k, v = tensors(layout, heads=3)
    routed = patterns.vorta(layout, routes=("full", "window"), window=(1, 1, 1))
    out = fps.attention(q[:, :2], k[:, :2], v[:, :2], grid=grid, block_mask=routed, tensor_layout="HND")
    coreset = patterns.coreset_attention(q[:, 2:], k[:, 2:], v[:, 2:], grid, (2, 2, 2))
    for head, mask in ((0, None), (1, fps.sliding_tile_mask(layout, (1, 1, 1)).to_token_mask()[0])):
        assert relative_l1(out[:, head], masked(q[:, head], k[:, head], v[:, head], mask)) < FP8
    chosen = patterns.Coreset(k[:, 2:], grid, (2, 2, 2))
    assert chosen.kept.shape == (1, 1, 512 // 2)
    want = chosen.give(masked(*(chosen.take(x[:, 2:]) for x in (q, k, v)), None))
    assert relative_l1(coreset, want) < FP8
    with pytest.raises(ConfigError, match=r"Coreset: group \(3, 2, 2\), expected sizes that divide grid \(4, 8, 16\)"):
        patterns.Coreset(k, grid, (3, 2, 2))
    with pytest.raises(ConfigError, match=r"reduction 0\.9, expected a token left of groups of 8"):
        patterns.Coreset(k, grid, (2, 2, 2), 0.9)
