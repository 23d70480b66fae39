"""Pictures of the slots: what each one gathers, and which few of them stand for the rest."""

from itertools import combinations
from math import ceil, comb
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from glmix.models.slot_maps import SlotMaps

IDLE = 0.97  # normalised assignment entropy from which slots count as idle: nothing to see in their maps


def representative_slots(assignment: torch.Tensor, count: int = 4) -> list[int]:
    """Indices of the slots that best stand for all: medoids of the assignment maps, each weighted by its area.

    Args:
        assignment: (M, h, w), weights of M slots over a grid, of one image.
        count: how many; fewer are returned where fewer slots differ.

    Returns:
        Slot indices, the one with the largest cluster first. Deterministic: an exhaustive search where it is small,
        else the build and swap phases of PAM (Kaufman and Rousseeuw, 1990), ties to the lower index.
    """
    maps = assignment.detach().float().cpu().flatten(1).numpy()
    mass = maps.sum(1)  # a slot that takes in much of the image counts for more
    maps = maps / np.maximum(np.linalg.norm(maps, axis=1, keepdims=True), 1e-12)
    distance = np.sqrt(np.maximum(2 - 2 * maps @ maps.T, 0)).round(5)
    distinct = [i for i in range(len(maps)) if not any(distance[i, j] == 0 for j in range(i))]
    count = min(count, len(distinct))

    def cost(chosen: tuple[int, ...]) -> float:
        return float((mass * distance[:, chosen].min(1)).sum())

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
    sizes = np.bincount(distance[:, best].argmin(1), weights=mass, minlength=count)
    return [best[i] for i in np.argsort(-sizes, kind="stable")]


def enlarge(maps: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps (n, h, w) at `size` (H, W) of the image, bilinear."""
    grown = torch.nn.functional.interpolate(torch.from_numpy(maps)[None], size=size, mode="bilinear", antialias=False)
    return grown[0].numpy()


def seen_through(image: NDArray[np.uint8], weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image (H, W, 3) in its colours where `weights` (H, W) in [0, 1] are high, pale grey elsewhere."""
    alpha = np.clip(weights, 0, 1)[..., None]
    pale = 190 + 0.25 * image.mean(2, keepdims=True)
    return (image * alpha + pale * (1 - alpha)).astype(np.uint8)


def mosaic(maps: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Maps (rows * columns, h, w) side by side in one array, with a gap of NaN around each."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
    h, w = padded.shape[1:]
    return padded.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)


def plot_slots(image: Image.Image, maps: SlotMaps, index: int = 0, count: int = 4, normalize: bool = False) -> Figure:
    """Figure of one image: itself, the image seen through the representative slots, and all assignment maps of a block.

    Args:
        image: as the network saw it (the crop, before normalisation).
        maps: of a block, from `slot_maps`.
        index: which image of the batch.
        count: number of representative slots.
        normalize: give each assignment map a scale of its own; by default all share one, so that faint ones look
            faint. The views through representative slots always fill their scale.
    """
    weights = maps.assignment[index].float().cpu().numpy()
    array = np.asarray(image)
    chosen = representative_slots(maps.assignment[index], count)
    colors = colormaps["tab10"](np.arange(len(chosen)))
    entropy = float(maps.entropy()[index])
    idle = " — idle: assignment close to uniform, what these maps show is noise" if entropy >= IDLE else ""
    side = ceil(len(chosen) ** 0.5)
    tall = array.shape[0] / array.shape[1]
    figure = Figure(figsize=(12, 4 * max(tall, 0.5) + 0.5), dpi=150, layout="constrained")
    figure.suptitle(f"{maps.block}, stride {maps.stride}, assignment entropy {entropy:.2f}{idle}", fontsize=10)
    panels: Any = figure.subfigures(1, 3)
    axis = panels[0].subplots()
    axis.imshow(array)
    axis.set_title("input", fontsize=8)
    axis.set_axis_off()
    views = panels[1].subplots(ceil(len(chosen) / side), side, squeeze=False).flat
    for axis in views:
        axis.set_axis_off()
    for place, (slot, color) in enumerate(zip(chosen, colors, strict=True)):
        axis = views[place]
        axis.imshow(seen_through(array, enlarge(weights[slot : slot + 1] / weights[slot].max(), array.shape[:2])[0]))
        axis.set_title(f"slot {slot}", fontsize=8, color=color)
    rows, columns = maps.slot_grid
    shown = weights / weights.max((1, 2), keepdims=True) if normalize else weights
    axis = panels[2].subplots()
    axis.imshow(mosaic(shown, rows, columns), cmap="magma", vmin=0, vmax=shown.max())
    axis.set_title(f"all {len(weights)} assignment maps", fontsize=8)
    axis.set_axis_off()
    h, w = weights.shape[1] + 2, weights.shape[2] + 2
    for slot, color in zip(chosen, colors, strict=True):
        corner = (slot % columns * w - 0.5, slot // columns * h - 0.5)
        axis.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=color, linewidth=2))
    return figure
