"""Where slots begin: each strategy is a small module that gives the seeds of a block.

A strategy takes what enters the block, (B, H, W, C), and returns seeds (B, M, C), or (1, M, C) where they are the same
for every image. `slot_grid` holds rows and columns where the M seeds lie on a grid, and None where they do not; `count()`
is M in both cases.
"""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from glmix.models.slots import pool_seeds

# 64 x 64 slots are more than the places of the finest grid at 224 px (56 x 56), so more could say nothing new; and the
# attention among M slots costs M * M: a million of them would run for minutes before it failed for want of memory
MOST_SLOTS = 4096

# torchvision's tracer keeps these whole, as timm's does: they ask for dtypes, which a trace does not know
torch.fx.wrap("pool_seeds")


def checked_grid(slot_grid: Any) -> tuple[int, int]:
    """Rows and columns of a slot grid.

    Raises:
        ValueError: it has none, or more than `MOST_SLOTS` places.
    """
    rows_and_columns = [slot_grid] * 2 if isinstance(slot_grid, int) else slot_grid
    try:
        slot_h, slot_w = (operator.index(number) for number in rows_and_columns)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a slot grid is rows and columns, such as 7 7, not {slot_grid}") from error
    if slot_h < 1 or slot_w < 1:
        raise ValueError(f"a slot grid has at least 1 row and 1 column, not {slot_h} x {slot_w}")
    if slot_h * slot_w > MOST_SLOTS:
        raise ValueError(f"a slot grid of {slot_h} x {slot_w} is beyond {MOST_SLOTS} slots, the most that make sense")
    return slot_h, slot_w


class PooledSeeds(nn.Module):
    """Features averaged over a grid of bins, one seed each; no parameters, so the grid may change at any time."""

    def __init__(self, dim: int, slot_grid: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        self.slot_grid = checked_grid(slot_grid)

    def count(self) -> int:
        """How many there are."""
        return self.slot_grid[0] * self.slot_grid[1]

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return pool_seeds(x_BHWC, self.slot_grid[0], self.slot_grid[1])


class LearnedSeeds(nn.Module):
    """Parameters, the same for every image (variant `paramslot`); as many as `slot_grid` has places."""

    def __init__(self, dim: int, slot_grid: tuple[int, int], device=None, dtype=None) -> None:
        super().__init__()
        slot_h, slot_w = checked_grid(slot_grid)
        self.slot_grid = None
        self.values = nn.Parameter(torch.empty(1, slot_h * slot_w, dim, device=device, dtype=dtype))
        nn.init.normal_(self.values, std=0.02)

    def count(self) -> int:
        """How many there are."""
        return self.values.shape[1]

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.values


SEEDS: dict[str, type[nn.Module]] = {"pooled": PooledSeeds, "learned": LearnedSeeds}
