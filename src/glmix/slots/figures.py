"""Figures of the slots, as matplotlib objects that people can restyle and save in any format.

Each takes the image as it is to be shown, at any size, and what `glmix.slot_maps` found in it. Maps share one scale
across slots, every figure tells the assignment entropy, and says so where slots are idle.
"""

import io
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from glmix.errors import UserError
from glmix.files import written_whole
from glmix.fonts import draw_figure
from glmix.models.slot_maps import SlotMaps
from glmix.slots.look import is_idle
from glmix.slots.regions import boundaries, enlarge, layout, merge_slots, patch_grid, square_patches, strongest_slots
from glmix.slots.representatives import representative_slots

WIDTH = 12  # inches


def figure_path(text: str) -> Path:
    """The file that `--figure TEXT` names, made sure of before the work whose figure would be lost; not touched.

    Raises:
        UserError: its ending is of no format that can be drawn, or it is a folder.
    """
    path = Path(text)
    if path.is_dir():
        raise UserError(f"--figure {text}: a folder; name a file, such as {path / 'quality.png'}")
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    try:
        Figure(figsize=(1, 1)).savefig(io.BytesIO(), format=path.suffix[1:].lower())
    except (ValueError, RuntimeError, OSError) as error:  # some formats need programs that may be missing
        raise UserError(f"--figure {text}: {str(error).splitlines()[0]}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole, in the format of the file's ending."""
    with written_whole(path) as file:
        draw_figure(figure, file, path.suffix[1:].lower())


def idle_at(maps: SlotMaps, index: int) -> bool:
    """Whether the slots of an image are idle."""
    return is_idle(float(maps.entropy()[index]))


def caption(maps: SlotMaps, index: int = 0, narrow: bool = False) -> str:
    """Block, stride, entropy and merged slots of an image's maps, and a warning where its slots are idle."""
    parts = [maps.block, f"stride {maps.stride}", f"assignment entropy {float(maps.entropy()[index]):.2f}"]
    if maps.sizes is not None:
        parts.append(f"{int((maps.sizes[index] > 0).sum())} slots of {int(maps.sizes[index].sum())} seeds")
    idle = "\nidle: the assignment is close to uniform,"
    idle += ("\n" if narrow else " ") + "what these maps show is noise"
    return ("\n" if narrow else ", ").join(parts) + (idle if idle_at(maps, index) else "")


def seen_through(image: NDArray[np.uint8], weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image (H, W, 3) in its colours where `weights` (H, W) in [0, 1] are high, pale grey elsewhere."""
    alpha = np.clip(weights, 0, 1)[..., None]
    pale = 190 + 0.25 * image.mean(2, keepdims=True)
    return (image * alpha + pale * (1 - alpha)).astype(np.uint8)


def seen_through_slot(
    image: NDArray[np.uint8], assignment: torch.Tensor, slot: int, idle: bool = False
) -> NDArray[np.uint8]:
    """The image (H, W, 3) seen through a slot of `assignment` (M, h, w).

    The slot's largest weight counts as 1; where slots are idle weights count as they are, and next to nothing is seen.
    """
    chosen = assignment[slot : slot + 1]
    return seen_through(image, enlarge(chosen if idle else chosen / chosen.max().clamp(min=1e-12), image.shape[:2])[0])


def tiled(maps: NDArray[Any], grid: tuple[int, int], blank: float = 0) -> NDArray[Any]:
    """Maps (M, h, w) side by side in one array, in a `grid` of rows and columns; `blank` where it has more than M."""
    rows, columns = grid
    count, h, w = maps.shape
    full = np.concatenate([maps, np.full((rows * columns - count, h, w), blank, maps.dtype)])
    return full.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)


def places(maps: SlotMaps) -> tuple[int, int]:
    """Rows and columns in which the slots of a block are laid out: their own grid, or what holds their number."""
    return maps.slot_grid or layout(maps.slots)


def slot_colors(count: int) -> NDArray[np.float64]:
    """RGB (count, 3) in 0..1, neighbours in number far apart in hue."""
    number = np.arange(count)
    hue, saturation, value = number * 0.618034 % 1, 0.55 + 0.4 * (number % 2), 1 - 0.2 * (number % 3)
    return hsv_to_rgb(np.stack([hue, saturation, value], 1))


def paint(
    image: NDArray[np.uint8], labels: NDArray[np.integer], colors: NDArray[np.float64], idle: bool = False
) -> NDArray[np.uint8]:
    """The image (H, W, 3) under the colours of its labels (H, W), with white contours; faint and without if `idle`."""
    grey, opacity = image.mean(2, keepdims=True), 0.1 if idle else 0.6
    painted = (1 - opacity) * grey + opacity * 255 * colors[labels]
    if not idle:
        painted[boundaries(labels, contour_width(image))] = 255
    return painted.astype(np.uint8)


def outline(image: NDArray[np.uint8], labels: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The image (H, W, 3) with the boundaries of its labels (H, W) in yellow."""
    drawn = image.copy()
    drawn[boundaries(labels, contour_width(image))] = (255, 230, 0)
    return drawn


def contour_width(image: NDArray[np.uint8]) -> int:
    return max(1, round(max(image.shape) / 300))


def show(axis: Axes, picture: NDArray[Any], title: str = "", color: Any = "black", **style: Any) -> None:
    """A picture without axes."""
    axis.imshow(picture, **style)
    axis.set_title(title, fontsize=8, color=color)
    axis.set_axis_off()


def row_of(count: int, shape: tuple[int, ...], title: str, rows: int = 1) -> tuple[Figure, Any]:
    """A figure of `rows` x `count` panels for images of `shape` (H, W, ...), and its axes (rows, count)."""
    width = max(WIDTH, 2.2 * count)
    height = rows * (width / count * shape[0] / shape[1] + 0.25) + 1
    figure = Figure(figsize=(width, min(height, 2.5 * WIDTH)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, count, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def plot_slots(image: Image.Image, maps: SlotMaps, index: int = 0, count: int = 4, normalize: bool = False) -> Figure:
    """The image, the image seen through its representative slots, and all assignment maps of a block (paper, figure 1).

    Args:
        image: as it is to be shown, at any size; the same part of the photo as the network saw.
        maps: of a block, from `slot_maps`.
        index: which image of the batch.
        count: number of representative slots.
        normalize: give each assignment map a scale of its own; by default all share one, so that faint ones look
            faint. The views through representative slots always fill their scale.
    """
    assignment = maps.assignment[index].float().cpu()
    weights = assignment.numpy()
    array = np.asarray(image)
    chosen = representative_slots(assignment, count)
    colors = colormaps["tab10"](np.arange(len(chosen)) % 10)
    side = ceil(len(chosen) ** 0.5)
    height = WIDTH / 3 * min(max(array.shape[0] / array.shape[1], 0.3), 3) + 0.6
    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained")
    figure.suptitle(caption(maps, index), fontsize=10)
    panels: Any = figure.subfigures(1, 3)
    show(panels[0].subplots(), array, "input")
    views = panels[1].subplots(ceil(len(chosen) / side), side, squeeze=False).flat
    for axis in views:
        axis.set_axis_off()
    for place, (slot, color) in enumerate(zip(chosen, colors, strict=True)):
        show(views[place], seen_through_slot(array, assignment, slot, idle_at(maps, index)), f"slot {slot}", color)
    grid = places(maps)
    shown = weights / weights.max((1, 2), keepdims=True) if normalize else weights
    scale = "each with a scale of its own" if normalize else f"0 to {shown.max():.2f}"
    framed = np.pad(shown, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)  # a gap around each
    axis = panels[2].subplots()
    show(axis, tiled(framed, grid, np.nan), f"all {len(weights)} assignment maps, {scale}",
         cmap="magma", vmin=0, vmax=shown.max())  # fmt: skip
    h, w = weights.shape[1] + 2, weights.shape[2] + 2
    for slot, color in zip(chosen, colors, strict=True):
        corner = (slot % grid[1] * w - 0.5, slot // grid[1] * h - 0.5)
        axis.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=color, linewidth=2))
    return figure


def plot_depths(image: Image.Image, depths: Sequence[SlotMaps], index: int = 0, count: int = 3) -> Figure:
    """Several blocks side by side: regions of the strongest slots, and the image through the representative ones.

    Args:
        image: as it is to be shown.
        depths: of each block, from `slot_maps`, in the order to show.
        index: which image of the batch.
        count: number of representative slots.
    """
    array = np.asarray(image)
    figure, axes = row_of(len(depths), array.shape, "blocks by depth", rows=1 + count)
    for column, maps in zip(axes.T, depths, strict=True):
        assignment, idle = maps.assignment[index].float().cpu(), idle_at(maps, index)
        labels = strongest_slots(assignment, array.shape[:2])
        show(column[0], paint(array, labels, slot_colors(len(assignment)), idle), caption(maps, index, narrow=True))
        for axis, slot in zip(column[1:], representative_slots(assignment, count), strict=False):
            show(axis, seen_through_slot(array, assignment, slot, idle), f"slot {slot}")
    return figure


def plot_found(image: Image.Image, found: Image.Image, maps: SlotMaps, index: int = 0) -> Figure:
    """What a head finds in the image, beside the strongest slots of a block.

    Args:
        image: as it is to be shown.
        found: the same with what was found drawn into it, of any size.
        maps: of a block, from `slot_maps`.
        index: which image of the batch.
    """
    array = np.asarray(image)
    figure, axes = row_of(2, array.shape, "what is found, and slots")
    assignment = maps.assignment[index].float().cpu()
    labels = strongest_slots(assignment, array.shape[:2])
    show(axes[0, 0], np.asarray(found), "found")
    show(axes[0, 1], paint(array, labels, slot_colors(len(assignment)), idle_at(maps, index)), caption(maps, index))
    return figure


def plot_paper(image: Image.Image, depths: Sequence[SlotMaps], index: int = 0, count: int = 4) -> Figure:
    """The paper's own form: the photo, and of each block all assignment maps and its representative ones, large.

    Each map has a scale of its own, so that faint ones look like strong ones; the other figures share one. What is
    framed among the small maps is large beside them, in a frame of the same colour.

    Args:
        image: as it is to be shown.
        depths: of each block, from `slot_maps`, in the order to show.
        index: which image of the batch.
        count: number of representative slots.

    Source: paper, figure 4 and the reference's visualisations, in viridis.
    """
    array = np.asarray(image)
    colors = colormaps["tab10"](np.arange(count) % 10)
    width, height = WIDTH, WIDTH / (1 + 2 * len(depths)) * array.shape[0] / array.shape[1] + 0.9
    figure = Figure(figsize=(1.6 * width, 1.6 * height), dpi=150, layout="constrained")
    panels: Any = figure.subfigures(1, 1 + 2 * len(depths))
    show(panels[0].subplots(), array, "input")
    for place, maps in enumerate(depths):
        assignment = maps.assignment[index].float().cpu()
        chosen = representative_slots(assignment, count)
        weights = assignment.numpy()
        low, high = weights.min((1, 2), keepdims=True), weights.max((1, 2), keepdims=True)
        scaled = (weights - low) / np.maximum(high - low, 1e-12)
        framed = np.pad(scaled, ((0, 0), (1, 1), (1, 1)), constant_values=np.nan)
        axis = panels[1 + 2 * place].subplots()
        show(
            axis, tiled(framed, places(maps), np.nan), caption(maps, index, narrow=True), cmap="viridis", vmin=0, vmax=1
        )
        side = ceil(len(chosen) ** 0.5)
        views = list(panels[2 + 2 * place].subplots(ceil(len(chosen) / side), side, squeeze=False).flat)
        for view in views:
            view.set_axis_off()
        h, w = framed.shape[1:]
        for view, slot, color in zip(views, chosen, colors, strict=False):
            row, column = divmod(slot, places(maps)[1])
            corner = column * w - 0.5, row * h - 0.5
            axis.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=color, linewidth=2))
            show(view, scaled[slot], f"slot {slot}", color, cmap="viridis", vmin=0, vmax=1)
            frame = Rectangle((-0.5, -0.5), w - 2, h - 2, fill=False, edgecolor=color, linewidth=4)
            view.add_patch(frame)
    return figure


def plot_regions(image: Image.Image, maps: SlotMaps, index: int = 0, merge: float = 0.4) -> Figure:
    """A segmentation-like picture: the strongest slot of each pixel, and those regions merged that hardly differ.

    Args:
        image: as it is to be shown.
        maps: of a block, from `slot_maps`.
        index: which image of the batch.
        merge: least likeness (cosine of assignment maps) at which adjacent regions are merged.
    """
    array = np.asarray(image)
    assignment = maps.assignment[index].float().cpu()
    colors = slot_colors(len(assignment))
    labels = strongest_slots(assignment, array.shape[:2])
    merged, idle = merge_slots(assignment, labels, merge), idle_at(maps, index)
    figure, axes = row_of(3, array.shape, caption(maps, index))
    show(
        axes[0, 0],
        paint(array, labels, colors, idle),
        f"strongest slot of each pixel, {len(np.unique(labels))} regions",
    )
    show(axes[0, 1], paint(array, merged, colors, idle), f"merged where alike, {len(np.unique(merged))} regions")
    show(axes[0, 2], array if idle else outline(array, merged), "their contours")
    return figure


def plot_attention(image: Image.Image, maps: SlotMaps, index: int = 0, slot: int | None = None) -> Figure:
    """What a slot attends to, drawn over the image: the mean of the heads, and each head.

    Args:
        image: as it is to be shown.
        maps: of a block, from `slot_maps(..., attention=True)`.
        index: which image of the batch.
        slot: the one that looks; None for the first of the representative slots.

    Raises:
        ValueError: no attention in `maps`, or no such slot.
    """
    if maps.attention is None:
        raise ValueError("these maps hold no attention: ask for it by slot_maps(model, images, attention=True)")
    array = np.asarray(image)
    assignment = maps.assignment[index].float().cpu()
    if slot is None:
        slot = representative_slots(assignment, 1)[0]
    if not 0 <= slot < len(assignment):
        raise ValueError(f"no slot {slot}; this block has 0 to {len(assignment) - 1}")
    looks = maps.attention[index, :, slot].float().cpu()  # (heads, M)
    mean = looks.mean(0)
    heads, columns = len(looks), max(3, ceil((len(looks) + 2) / 2))
    rows = ceil((heads + 2) / columns)
    figure, axes = row_of(columns, array.shape, f"{caption(maps, index)}\nattention of slot {slot}", rows=rows)
    show(axes.flat[0], seen_through_slot(array, assignment, slot, idle_at(maps, index)), f"slot {slot}, which looks")
    names = ["mean of all heads"] + [f"head {h}" for h in range(heads)]
    overlays = torch.einsum("am,mhw->ahw", torch.cat([mean[None], looks]), assignment)
    top = float(overlays.max())
    for axis, name, overlay, weights in zip(
        axes.flat[1:], names, enlarge(overlays, array.shape[:2]), [mean, *looks], strict=False
    ):
        show(
            axis,
            array.mean(2),
            f"{name}: most at slot {int(weights.argmax())} ({float(weights.max()):.0%})",
            cmap="gray",
        )
        axis.imshow(overlay, cmap="magma", alpha=0.65, vmin=0, vmax=top)
    own = strongest_slots(assignment, array.shape[:2])
    height, width = array.shape[:2]
    centres = centres_of(assignment, (height, width))
    axis = axes.flat[1]
    for other in mean.topk(min(5, len(mean))).indices.tolist():
        if other != slot:
            line = np.stack([centres[slot], centres[other]])
            axis.plot(*line.T, color="white", linewidth=0.5 + 6 * float(mean[other]), marker="o", markersize=2)
    if (own == slot).any():
        axis.contour(own == slot, levels=[0.5], colors=["#00e5ff"], linewidths=1.2)
    axis.set_xlim(0, width - 1)
    axis.set_ylim(height - 1, 0)
    return figure


def centres_of(assignment: torch.Tensor, size: tuple[int, int]) -> NDArray[np.float64]:
    """Centre (M, 2) of the strong part of each map (M, h, w), as x and y in an image of `size` (H, W)."""
    maps = assignment.double().numpy()
    maps = (maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-300)) ** 4  # faint places far away do not pull
    share = maps / np.maximum(maps.sum((1, 2), keepdims=True), 1e-300)
    _, h, w = maps.shape
    x = (share.sum(1) * (np.arange(w) + 0.5)).sum(1) * size[1] / w
    y = (share.sum(2) * (np.arange(h) + 0.5)).sum(1) * size[0] / h
    return np.stack([x, y], 1)


def plot_patches(image: Image.Image, maps: SlotMaps, index: int = 0) -> Figure:
    """Soft irregular regions beside the square patches of a vision transformer with as many tokens (or about as many).

    Above, their boundaries. Below, what is left of the image when every token holds one mean colour: of the pixels that
    a slot gathers (clustering), given back by assignment; of the pixels of a square.

    Args:
        image: as it is to be shown.
        maps: of a block, from `slot_maps`.
        index: which image of the batch.
    """
    array = np.asarray(image)
    assignment, clustering = maps.assignment[index].float().cpu(), maps.clustering[index].float().cpu()
    size, grid = array.shape[:2], patch_grid(maps)
    squares, count = square_patches(size, grid), grid[0] * grid[1]
    colors = torch.from_numpy(array.copy()).permute(2, 0, 1).float()
    small = torch.nn.functional.interpolate(colors[None], clustering.shape[1:], mode="area")[0]
    slot_color = torch.einsum("mhw,chw->mc", clustering, small)
    through_slots = enlarge(torch.einsum("mhw,mc->chw", assignment, slot_color), size).transpose(1, 2, 0)
    area = np.bincount(squares.ravel(), minlength=count)
    means = [np.bincount(squares.ravel(), array[..., c].ravel(), count) / np.maximum(area, 1) for c in range(3)]
    through_squares = np.stack(means, 1)[squares]
    figure, axes = row_of(2, array.shape, caption(maps, index), rows=2)
    soft = array if idle_at(maps, index) else outline(array, strongest_slots(assignment, size))
    show(axes[0, 0], soft, f"{len(assignment)} soft slots (where each is strongest)")
    show(axes[0, 1], outline(array, squares), f"{count} square patches")
    show(axes[1, 0], through_slots.clip(0, 255).astype(np.uint8), "one colour a slot, gathered and dispatched")
    show(axes[1, 1], through_squares.astype(np.uint8), "one colour a patch")
    return figure
