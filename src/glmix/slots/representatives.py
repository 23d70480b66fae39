"""Which few slots stand for all of them: k-medoids of the assignment maps."""

from collections.abc import Callable
from itertools import combinations
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray

EXHAUSTIVE = 5000  # numbers of subsets up to which all are tried


def representative_slots(assignment: torch.Tensor, count: int = 4) -> list[int]:
    """Indices of the slots that best stand for all: medoids of the assignment maps, each weighted by its area.

    Args:
        assignment: (M, h, w), weights of M slots over a grid, of one image.
        count: how many; fewer are returned where fewer slots differ.

    Returns:
        Slot indices, the one with the largest cluster first. Deterministic: an exhaustive search where it is small,
        else the build and swap phases of PAM (Kaufman and Rousseeuw, 1990), ties to the lower index.

    Raises:
        ValueError: `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count is at least 1, not {count}")
    maps = assignment.detach().float().cpu().flatten(1).numpy()
    mass = maps.sum(1)  # a slot that takes in much of the image counts for more
    distance = map_distances(maps)
    distinct = [i for i in range(len(maps)) if not (distance[i, :i] == 0).any()]
    chosen = medoids(distance, mass, distinct, min(count, len(distinct)))
    sizes = np.bincount(distance[:, chosen].argmin(1), weights=mass, minlength=len(chosen))
    return [chosen[i] for i in np.argsort(-sizes, kind="stable")]


def map_distances(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """Distances (M, M) of the directions of maps (M, pixels): 0 where one is a multiple of the other, at most sqrt(2)."""
    maps64 = maps.astype(np.float64)  # equal maps must come out as equal
    unit = maps64 / np.maximum(np.linalg.norm(maps64, axis=1, keepdims=True), 1e-12)
    squares = (unit * unit).sum(1)
    distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * unit @ unit.T, 0)).round(5)
    np.fill_diagonal(distance, 0)
    return distance


def medoids(distance: NDArray[np.float64], mass: NDArray[np.float32], among: list[int], count: int) -> tuple[int, ...]:
    """`count` of the points `among` all, such that the distances to the nearest of them, times `mass`, are least."""

    def cost(chosen: tuple[int, ...]) -> float:
        return float((mass * distance[:, chosen].min(1)).sum())

    if comb(len(among), count) <= EXHAUSTIVE:
        return min(combinations(among, count), key=cost)
    return swapped(built(cost, among, count), cost, among)


def built(cost: Callable[[tuple[int, ...]], float], among: list[int], count: int) -> tuple[int, ...]:
    """PAM's first phase: one point after the other, each the best beside those before."""
    chosen: tuple[int, ...] = ()
    for _ in range(count):
        chosen = min(((*chosen, i) for i in among if i not in chosen), key=cost)
    return chosen


def swapped(chosen: tuple[int, ...], cost: Callable[[tuple[int, ...]], float], among: list[int]) -> tuple[int, ...]:
    """PAM's second phase: the best swap of a chosen for another point, until none is better."""
    while True:
        swaps = [(*(b for b in chosen if b != out), new) for out in chosen for new in among if new not in chosen]
        better = min(swaps, key=cost)
        if cost(better) >= cost(chosen) - 1e-9:
            return chosen
        chosen = better
