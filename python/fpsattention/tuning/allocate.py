"""The cheapest choice of windows and scales whose predicted error keeps a bound: equal marginal gain everywhere.

A *cell* is one (layer, phase). All its heads share a kind of launch (FP8 with scales of a granularity, in which each head has a window; a pattern, which
all heads share; BF16). For a price ``lam`` of cost
in units of squared error, every cell takes, on its own, the option of least ``error + lam * cost``; falling ``lam`` walks down the lower convex
hull of error against cost. A bisection on ``lam`` finds the cheapest point that keeps the bound, which among the points of that hull is the
best there is (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .settings import COST, cost_of

#: Kind of launch -> the share of the pairs that each of its options attends.
Densities = Mapping[str, Sequence[float]]

# Of the bisection: the price is found to 1 part in 1e12 of its range, which is below any difference of errors
STEPS = 80


@dataclass(frozen=True)
class Choice:
    """Of a cell: BF16 (``kind`` None), or a kind and one of its options for each head, or one for all (indices into the candidates: windows of a
    granularity, ratios of a pattern)."""

    kind: str | None
    options: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cell:
    """What is known of one (layer, phase).

    Attributes:
        errors: kind to squared errors ``[heads, options]``, in units of the result; empty: not measured, stays BF16.
        weight: its share of all calls.
    """

    errors: Mapping[str, np.ndarray]
    weight: float


@dataclass(frozen=True)
class Allocation:
    """Attributes: choices per cell; squared predicted ``error``; ``cost`` (relative to FP8 dense); ``density`` (mean share of pairs)."""

    choices: tuple[Choice, ...]
    error: float
    cost: float
    density: float


def at_price(cells: Sequence[Cell], densities: Densities, lam: float) -> Allocation:
    """The best choice of every cell at a price; ties go to the cheaper one, so that the result is one and the same everywhere."""
    choices, error, cost, density = [], 0.0, 0.0, 0.0
    for cell in cells:
        best = (lam * cell.weight * COST["bf16"], cell.weight * COST["bf16"], Choice(None), 0.0, 1.0)
        for kind, errors in cell.errors.items():
            heads, share = errors.shape[0], np.asarray(densities[kind])
            costs = share * (cell.weight * cost_of(kind) / heads)
            picked = tuple(int(i) for i in np.argmin(errors + lam * costs[None], axis=1))  # the first, cheapest one
            e = float(sum(errors[h, w] for h, w in enumerate(picked)))
            c = float(sum(costs[w] for w in picked))
            d = float(sum(share[w] for w in picked)) / heads
            if (e + lam * c, c) < best[:2]:
                best = (e + lam * c, c, Choice(kind, picked), e, d)
        choices.append(best[2])
        error, cost, density = error + best[3], cost + best[1], density + cell.weight * best[4]
    return Allocation(tuple(choices), error, cost, density)


def within_error(cells: Sequence[Cell], densities: Densities, error: float) -> Allocation:
    """A cheap allocation with a squared error of at most ``error``; BF16 everywhere has none, so there always is one."""
    found = _bisect(cells, densities, lambda found: found.error <= error)
    return _polished(cells, densities, found, "error", error)


def within_cost(cells: Sequence[Cell], densities: Densities, cost: float) -> Allocation:
    """The allocation of least error that costs at most ``cost``; the cheapest one where all cost more."""
    low, high = _range(cells)
    if at_price(cells, densities, high).cost > cost:
        return at_price(cells, densities, high)
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if at_price(cells, densities, middle).cost <= cost else (middle, high)
    return _polished(cells, densities, at_price(cells, densities, high), "cost", cost)


def frontier(cells: Sequence[Cell], densities: Densities, points: int = 24) -> list[Allocation]:
    """Allocations along the hull, cheapest first."""
    low, high = _range(cells)
    prices = np.geomspace(high, low, 8 * points)
    found = {a.choices: a for a in (at_price(cells, densities, float(price)) for price in prices)}
    allocations = sorted(found.values(), key=lambda a: a.cost)
    step = max(1, len(allocations) // points)
    return [*allocations[:-1:step], allocations[-1]]


def _polished(cells: Sequence[Cell], densities: Densities, start: Allocation, bound: str, limit: float) -> Allocation:
    """Between two points of the hull there is room: windows of single heads change, the move that gains most first, while the bound holds.

    ``bound`` "cost": what is left of the cost buys accuracy; "error": what is left of the error saves cost.
    """
    found = start
    while True:
        best = (1e-12 * max(found.cost if bound == "error" else found.error, 1e-300), 0, 0, 0, 0.0, 0.0)
        for i, (cell, choice) in enumerate(zip(cells, found.choices, strict=True)):
            if choice.kind is None:
                continue
            errors, share = cell.errors[choice.kind], np.asarray(densities[choice.kind])
            heads, options = np.arange(len(choice.options)), np.array(choice.options)
            more_error = errors - errors[heads, options][:, None]
            more_cost = (share[None] - share[options][:, None]) * (cell.weight * cost_of(choice.kind) / len(options))
            spent, gained = (more_cost, -more_error) if bound == "cost" else (more_error, -more_cost)
            left = limit - (found.cost if bound == "cost" else found.error)
            gained = np.where(spent <= left, gained, -np.inf)
            h, w = np.unravel_index(int(np.argmax(gained)), gained.shape)
            if gained[h, w] > best[0]:
                best = (float(gained[h, w]), i, int(h), int(w), float(more_error[h, w]), float(more_cost[h, w]))
        _, at, head, option, error, cost = best
        if error == cost == 0.0:
            return found
        old = found.choices[at]
        assert old.kind is not None
        new = Choice(old.kind, (*old.options[:head], option, *old.options[head + 1 :]))
        attended = densities[old.kind]
        wider = float(attended[option] - attended[old.options[head]]) * cells[at].weight / len(new.options)
        choices = (*found.choices[:at], new, *found.choices[at + 1 :])
        found = Allocation(choices, found.error + error, found.cost + cost, found.density + wider)


def _bisect(cells: Sequence[Cell], densities: Densities, holds) -> Allocation:  # type: ignore[no-untyped-def]
    low, high = _range(cells)  # a low price buys accuracy
    if holds(at_price(cells, densities, high)):
        return at_price(cells, densities, high)
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(at_price(cells, densities, middle)) else (low, middle)
    return at_price(cells, densities, low)


def _range(cells: Sequence[Cell]) -> tuple[float, float]:
    """Prices at which everything is BF16, and at which everything is as cheap as can be."""
    errors = np.concatenate([e.ravel() for cell in cells for e in cell.errors.values()] or [np.ones(1)])
    largest = float(errors.max()) or 1.0
    positive = errors[errors > 0]
    smallest = float(positive.min()) if positive.size else largest
    weight = min(cell.weight for cell in cells)
    return smallest * 1e-9, largest * 1e9 / weight
