"""From soft slots to a picture's regions: which slot is strongest where, and which of those belong together."""

from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from glmix.models.slot_maps import SlotMaps


def enlarge(maps: torch.Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps (M, h, w) at `size` (H, W), bilinear; float32."""
    grown = F.interpolate(maps.detach().float().cpu()[None], size=size, mode="bilinear", align_corners=False)
    return grown[0].numpy()


def strongest_slots(assignment: torch.Tensor, size: tuple[int, int] | None = None) -> NDArray[np.int64]:
    """Index (H, W) of the slot with the largest assignment at each place.

    Args:
        assignment: (M, h, w) of one image.
        size: (H, W) to which the maps are enlarged before; (h, w) if None.
    """
    h, w = assignment.shape[1:]
    return enlarge(assignment, size or (h, w)).argmax(0)


def layout(count: int) -> tuple[int, int]:
    """Rows and columns, nearly as many of each, that hold `count` pictures; the last row may not be full."""
    rows = max(1, round(count**0.5))
    return rows, ceil(count / rows)


def patch_grid(maps: SlotMaps) -> tuple[int, int]:
    """Rows and columns of the square patches that a block's slots are compared with.

    Those of the slots' own grid; else, of the grids that are square or have one column more than rows, that with the
    number of patches nearest to the number of slots.
    """
    side = int(maps.slots**0.5)
    grids = [(side, side), (side, side + 1), (side + 1, side + 1)]
    return maps.slot_grid or min(grids, key=lambda grid: abs(grid[0] * grid[1] - maps.slots))


def square_patches(size: tuple[int, int], grid: tuple[int, int]) -> NDArray[np.int64]:
    """Labels (H, W) of a partition of `size` into `grid` rows x columns of rectangles: a vision transformer's patches."""
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, grid, strict=True))
    return rows[:, None] * grid[1] + columns


def boundaries(labels: NDArray[np.integer], thickness: int = 1) -> NDArray[np.bool_]:
    """Pixels (H, W) that touch a pixel of another label, below or to the right; widened to `thickness` pixels."""
    edge = np.zeros(labels.shape, bool)
    edge[:-1] |= labels[:-1] != labels[1:]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    if thickness > 1:
        grown = F.max_pool2d(torch.from_numpy(edge)[None].float(), thickness, 1, thickness // 2)[0] > 0
        edge = grown[: labels.shape[0], : labels.shape[1]].numpy()
    return edge


def merge_slots(assignment: torch.Tensor, labels: NDArray[np.integer], least: float = 0.4) -> NDArray[np.int64]:
    """Regions of `labels` merged where the network hardly separates them; each keeps the label of its largest part.

    Pairs of adjacent regions are merged, the most alike first, as long as the cosine of their (summed) assignment maps
    is `least` or more: maps that overlap much share their pixels.

    Args:
        assignment: (M, h, w) of one image.
        labels: (H, W) slot indices, from `strongest_slots`.
        least: 1 merges only equal maps, 0 all.
    """
    shape = labels.shape
    present, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(shape)  # flat from NumPy below 2
    sums = assignment.detach().double().cpu().flatten(1).numpy()[present]
    sizes = np.bincount(labels.ravel())
    touching = np.zeros((len(present),) * 2, bool)
    for near, far in ((labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])):
        touching[near.ravel(), far.ravel()] = touching[far.ravel(), near.ravel()] = True
    np.fill_diagonal(touching, False)
    target = np.arange(len(present))
    while touching.any():
        unit = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-300)
        alike = np.where(touching, unit @ unit.T, -1)
        one, other = np.unravel_index(alike.argmax(), alike.shape)
        if alike[one, other] < least:
            break
        keep, gone = (one, other) if sizes[one] >= sizes[other] else (other, one)
        target[target == gone] = keep
        sums[keep] += sums[gone]
        sizes[keep] += sizes[gone]
        touching[keep] |= touching[gone]
        touching[:, keep] |= touching[:, gone]
        touching[gone] = touching[:, gone] = False
        touching[keep, keep] = False
    return present[target][labels]
