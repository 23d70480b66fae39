"""Pictures of the slots: what each one gathers, and which few of them stand for the rest."""

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from glmix.models.slot_maps import SlotMaps

IDLE = 0.97  # normalised assignment entropy from which slots count as idle: nothing to see in their maps


def representative_slots(assignment: torch.Tensor, count: int = 4) -> list[int]:
    """Indices of the slots that best stand for all: the medoids of their assignment maps.

    Args:
        assignment: (M, h, w), weights of M slots over a grid, of one image.
        count: how many; fewer are returned where fewer slots differ.

    Returns:
        Slot indices, the one with the largest cluster first. Deterministic: an exhaustive search where it is small,
        else the build and swap phases of PAM (Kaufman and Rousseeuw, 1990), ties to the lower index.
    """
    maps = assignment.detach().float().cpu().flatten(1).numpy()
    maps = maps / np.maximum(np.linalg.norm(maps, axis=1, keepdims=True), 1e-12)
    distance = np.sqrt(np.maximum(2 - 2 * maps @ maps.T, 0)).round(5)
    distinct = [i for i in range(len(maps)) if not any(distance[i, j] == 0 for j in range(i))]
    count = min(count, len(distinct))

    def cost(chosen: tuple[int, ...]) -> float:
        return float(distance[:, chosen].min(1).sum())

    if comb(len(distinct), count) <= 5000:
        best = min(combinations(distinct, count), key=cost)
    else:
        best = ()
        for _ in range(count):
            best = min(((*best, i) for i in distinct if i not in best), key=cost)
        while True:
            swaps = [(*(b for b in best if b != out), new) for out in best for new in distinct if new not in best]
            better = min(swaps, key=cost)
            if cost(better) >= cost(best) - 1e-9:
                break
            best = better
    sizes = np.bincount(distance[:, best].argmin(1), minlength=count)
    return [best[i] for i in np.argsort(-sizes, kind="stable")]


def enlarge(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps (n, h, w) at `size` (H, W) of the image, bilinear."""
    grown = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], size=size, mode="bilinear", antialias=False)
    return grown[0].numpy()


def seen_through(image: NDArray[np.uint8], weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image (H, W, 3) where `weights` (H, W) in [0, 1] are high, fading to white elsewhere."""
    alpha = np.clip(weights, 0, 1)[..., None]
    return (image * alpha + 255 * (1 - alpha)).astype(np.uint8)


def plot_slots(image: Image.Image, maps: SlotMaps, index: int = 0, count: int = 4, normalize: bool = False) -> Figure:
    """Figure of one image: itself, the representative slots, and all assignment maps of a block.

    Args:
        image: as the network saw it (the crop, before normalisation).
        maps: of a block, from `slot_maps`.
        index: which image of the batch.
        count: number of representative slots.
        normalize: give each map a scale of its own; by default all share one, so that faint ones look faint.
    """
    assignment = maps.assignment[index].float().cpu()
    array = np.asarray(image)
    entropy = float(maps.entropy()[index])
    chosen = representative_slots(assignment, count)
    weights = assignment.numpy()
    rows, columns = maps.slot_grid
    colors = colormaps["tab10"](np.arange(count))
    figure = Figure(figsize=(2.1 * (count + 1), 2.5 + 0.62 * rows), dpi=150, layout="constrained")
    panels: Any = figure.subfigures(2, 1, height_ratios=[2.6, 0.62 * rows])
    upper, lower = panels
    note = f"{maps.block}, stride {maps.stride}, assignment entropy {entropy:.2f}"
    figure.suptitle(note + (" — idle: close to uniform, these maps show noise" if entropy >= IDLE else ""), fontsize=9)
    axes = upper.subplots(1, count + 1)
    axes[0].imshow(array)
    axes[0].set_title("input", fontsize=8)
    peak = weights.max()
    for axis, slot, color in zip(axes[1:], chosen, colors, strict=False):
        scaled = weights[slot] / (weights[slot].max() if normalize else peak)
        axis.imshow(seen_through(array, enlarge(scaled[None], array.shape[:2])[0]))
        axis.set_title(f"slot {slot}", fontsize=8, color=color)
    for axis in axes:
        axis.set_axis_off()
    grid = lower.subplots(rows, columns, squeeze=False)
    for slot, axis in enumerate(grid.flat):
        axis.imshow(weights[slot], cmap="magma", vmin=0, vmax=weights[slot].max() if normalize else peak)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(slot in chosen)
            if slot in chosen:
                spine.set(color=colors[chosen.index(slot)], linewidth=2)
    return figure
