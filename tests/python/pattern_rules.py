"""The published rules of ``fpsattention.patterns`` in plain Python, token by token: what the tests compare with.

Written from the papers' formulas (the docstrings of the patterns name them) and not from the implementation: lists, loops, FP64.
A rule returns, per (batch, head), the video blocks that each video tile keeps.
"""

from __future__ import annotations

import math

import numpy as np


class Slots:
    """Tokens of every tile and block, and where video tokens are."""

    def __init__(self, layout):
        slots = layout.token_of_slot.tolist()
        self.blocks = [[t for t in slots[i : i + 128] if t >= 0] for i in range(0, len(slots), 128)]
        offsets = layout.tile_block_offsets.tolist()
        self.blocks_of_tile = [list(range(a, b)) for a, b in zip(offsets, offsets[1:], strict=False)]
        self.tiles = [[t for b in blocks for t in self.blocks[b]] for blocks in self.blocks_of_tile]
        self.video_tiles = math.prod(layout.tile_grid)
        self.text_blocks = [b for blocks in self.blocks_of_tile[self.video_tiles :] for b in blocks]
        self.video_blocks = [b for b in range(len(self.blocks)) if b not in self.text_blocks]
        self.first = layout.text_len if layout.text_position == "prefix" else 0
        self.grid = layout.grid

    def place(self, token):
        """(frame, row, column) of a video token."""
        raster = token - self.first
        _, h, w = self.grid
        return raster // (h * w), raster // w % h, raster % w

    def rows(self, chosen):
        """Complete lists: own tile first, then ascending, text both ways."""
        lists = []
        for tile, own in enumerate(self.blocks_of_tile):
            if tile >= self.video_tiles:
                kept = set(range(len(self.blocks)))
            else:
                kept = set(chosen[tile]) | set(self.text_blocks) | set(own)
            lists.append(sorted(own) + sorted(kept - set(own)))
        return lists


def softmax(row):
    weights = np.exp(row - np.max(row))
    return weights / weights.sum()


def block_scores(slots, q, k):
    """``s_ij`` of one head from means of tokens: ``[video tiles, video blocks]``."""
    means = np.stack([k[slots.blocks[b]].mean(0) for b in slots.video_blocks])
    queries = np.stack([q[slots.tiles[i]].mean(0) for i in range(slots.video_tiles)])
    return queries @ means.T / math.sqrt(q.shape[1])


def by_falling(weights):
    return sorted(range(len(weights)), key=lambda j: -weights[j])


def until(weights, mass, at_least=0):
    """Largest first, while what was taken before is below ``mass``."""
    taken, before = [], 0.0
    for j in by_falling(weights):
        if before >= mass and len(taken) >= at_least:
            break
        taken.append(j)
        before += weights[j]
    return taken


def topk_mean(slots, q, k, ratio):
    s = block_scores(slots, q, k)
    result = []
    for i, row in enumerate(s):
        own = slots.blocks_of_tile[i]
        others = [j for j in by_falling(row) if j not in own]
        biggest = max(math.ceil(math.prod(slots.tile_volume) / 128), 1, int(ratio * len(row)))
        result.append((own + others)[: min(biggest, len(row))])
    return result


def cdf_mean(slots, q, k, mass, min_ratio=0.0, by_size=False):
    s = block_scores(slots, q, k)
    if by_size:
        s = s + np.log([len(slots.blocks[b]) for b in slots.video_blocks])
    return [until(softmax(row), mass, int(min_ratio * len(row))) for row in s]


def mean_cosine(x):
    """Mean over all pairs of tokens, themselves included."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (unit @ unit.T).mean()


def sparge(slots, q, k, mass, ratio, similarity, smooth_k):
    if smooth_k:
        k = k - k.mean(0)
    s = block_scores(slots, q, k)
    unlike = [j for j, b in enumerate(slots.video_blocks) if mean_cosine(k[slots.blocks[b]]) <= similarity]
    like = [j for j in range(s.shape[1]) if j not in unlike]
    result = []
    for i, row in enumerate(s):
        if mean_cosine(q[slots.tiles[i]]) <= similarity:
            result.append(list(range(len(row))))
            continue
        weights = dict(zip(like, softmax(row[like]), strict=True)) if like else {}
        order = sorted(like, key=lambda j: -weights[j])
        taken, total = [], 0.0
        for rank, j in enumerate(order):
            total += weights[j]
            if (rank < max(int(ratio * len(row)), 1)) if mass is None else (total <= mass or rank == 0):
                taken.append(j)
        result.append(taken + unlike)
    return result


def draft(slots, q, k, sparsity):
    weights = np.stack([softmax(row) for row in block_scores(slots, q, k)])
    own = [(i, j) for i in range(len(weights)) for j in slots.blocks_of_tile[i]]
    pairs = [(i, j) for i in range(weights.shape[0]) for j in range(weights.shape[1]) if (i, j) not in own]
    budget = max(int((1 - sparsity) * weights.size + 1e-9), len(own))
    chosen = own + sorted(pairs, key=lambda pair: -weights[pair])[: budget - len(own)]
    return [[j for i, j in chosen if i == tile] for tile in range(len(weights))]


def vmoba(slots, q, k, layer, threshold, scope, top):
    kind = ("time", "space", "volume")[layer % 3]
    tiles = range(slots.video_tiles)
    _, nh, nw = slots.tile_grid
    label = {"time": lambda i: i // (nh * nw), "space": lambda i: i % (nh * nw), "volume": lambda i: i}[kind]
    chunks = sorted({label(i) for i in tiles})
    means = [k[[t for i in tiles if label(i) == c for t in slots.tiles[i]]].mean(0) for c in chunks]
    gates = np.array([[q[slots.tiles[i]].mean(0) @ m for m in means] for i in tiles])
    if top is not None:
        chosen = [
            ([label(i)] + [c for c in by_falling(gates[i]) if c != label(i)])[: min(top, len(chunks))] for i in tiles
        ]
    elif scope == "query":
        chosen = []
        for i in tiles:
            w = (gates[i] - gates[i].min()) / (gates[i].max() - gates[i].min())
            kept, total = [label(i)], w[label(i)]
            for c in by_falling(w):
                if c != label(i) and total / w.sum() < threshold:
                    kept.append(c)
                    total += w[c]
            chosen.append(kept)
    else:
        w = (gates - gates.min()) / (gates.max() - gates.min())
        chosen = [[label(i)] for i in tiles]
        total = sum(w[i, label(i)] for i in tiles)
        others = [(i, c) for i in tiles for c in chunks if c != label(i)]
        for i, c in sorted(others, key=lambda pair: -w[pair]):
            if total / w.sum() >= threshold:
                break
            chosen[i].append(c)
            total += w[i, c]
    return [[b for j in tiles if label(j) in chosen[i] for b in slots.blocks_of_tile[j]] for i in tiles]


def share_kept(slots, attends, min_share, inclusive):
    """Blocks of which the token rule ``attends(place, place)`` keeps more than (or at least) ``min_share`` of the pairs."""
    places = [[slots.place(t) for t in tokens] for tokens in slots.blocks]
    result = []
    for i in range(slots.video_tiles):
        tile = [place for b in slots.blocks_of_tile[i] for place in places[b]]
        shares = [
            sum(attends(a, b) for a in tile for b in places[j]) / (len(tile) * len(places[j]))
            for j in slots.video_blocks
        ]
        result.append([j for j, s in enumerate(shares) if (s >= min_share if inclusive else s > min_share)])
    return result


def radial_rule(grid, decay, neighbour, sink, block):
    _, h, w = grid
    pixels = h * w
    power = 2 ** len(bin(pixels)[2:])

    def attends(a, b):
        d = abs(a[0] - b[0])
        if d == 0 or (sink and b[0] == 0):
            return True
        group = 2 ** len(bin(d)[2:])
        if power / group < block and d % int(block / (power / group)) != 0:
            return False
        wide = pixels * neighbour if d == 1 else max(decay * power / group, block)
        return abs((a[1] * w + a[2]) - (b[1] * w + b[2])) <= wide

    return attends


def svg_rules(grid, share, sink):
    t, h, w = grid
    width = int(t * h * w * (1 - math.sqrt(1 - share)))

    def spatial(a, b):
        p, r = ((x[0] * h + x[1]) * w + x[2] for x in (a, b))
        return (sink and b[0] == 0) or abs(p - r) < width

    def temporal(a, b):
        p, r = ((x[1] * w + x[2]) * t + x[0] for x in (a, b))
        return (sink and b[0] == 0) or abs(p - r) < width

    return spatial, temporal


def svg(slots, q, k, v, masks, sampled):
    """The better of two block masks for the sampled rows of one head."""
    errors = []
    for mask in masks:
        lists = slots.rows(mask)
        error = 0.0
        for row in sampled:
            tile = next(i for i, tokens in enumerate(slots.tiles) if row in tokens)
            seen = [t for b in lists[tile] for t in slots.blocks[b]]
            logits = q[row] @ k.T / math.sqrt(q.shape[1])
            error += (((softmax(logits[seen]) @ v[seen]) - softmax(logits) @ v) ** 2).sum()
        errors.append(error)
    return masks[errors.index(min(errors))]


def blade(slots, q, k, places, mass, min_ratio, max_ratio):
    samples = [[tokens[p * len(tokens) // 128] for p in places] for tokens in slots.blocks]
    video = slots.video_blocks
    result = []
    for i in range(slots.video_tiles):
        masses = np.zeros(len(video))
        for b in slots.blocks_of_tile[i]:
            for row in samples[b]:
                logits = np.array([q[row] @ k[t] for j in video for t in samples[j]]) / math.sqrt(q.shape[1])
                masses += softmax(logits).reshape(len(video), -1).sum(1)
        masses /= masses.sum()
        order, total, count = by_falling(masses), 0.0, 0
        for j in order:
            total += masses[j]
            if total >= mass:
                break
            count += 1
        count = min(max(count, max(1, int(min_ratio * len(video)))), max(1, int(max_ratio * len(video))))
        own = slots.blocks_of_tile[i]
        result.append((own + [j for j in order if j not in own])[:count])
    return result


def antidiagonal(slots, layout, q, k, stride, mass):
    padded = layout.token_of_slot.tolist()
    dim = q.shape[1]

    def vector(x, slot):
        return x[padded[slot]] if padded[slot] >= 0 else np.zeros(dim)

    groups = range(0, 128 * len(slots.video_blocks), stride)
    real = [g for g in groups if any(padded[g + r] >= 0 for r in range(stride))]
    result = []
    for i in range(slots.video_tiles):
        masses = np.zeros(len(slots.video_blocks))
        for g in real:
            if g // 128 not in slots.blocks_of_tile[i]:
                continue
            logits = [
                sum(vector(q, g + stride - 1 - r) @ vector(k, n + r) for r in range(stride)) / (math.sqrt(dim) * stride)
                for n in real
            ]
            for n, weight in zip(real, softmax(np.array(logits)), strict=True):
                masses[n // 128] += weight
        result.append(until(masses / masses.sum(), mass))
    return result


def exact(slots, q, k, lse, mass):
    result = []
    for i in range(slots.video_tiles):
        rows = slots.tiles[i]
        weights = np.exp(q[rows] @ k.T / math.sqrt(q.shape[1]) - lse[rows][:, None])
        masses = np.array([weights[:, slots.blocks[b]].sum() for b in slots.video_blocks])
        result.append(until(masses / masses.sum(), mass))
    return result
