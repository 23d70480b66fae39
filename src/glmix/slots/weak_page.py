"""Pictures and a page of masks from image labels: what was gained, what was lost, and where."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from glmix.data.masks import IGNORED
from glmix.data.samples import Source
from glmix.page import heading, image, paragraph, table, write_page
from glmix.slots.figures import save_figure
from glmix.slots.quality import bounded
from glmix.slots.weak import (
    PLAIN,
    SLIC,
    SLOTS,
    THRESHOLDS,
    Measured,
    Row,
    Seer,
    all_scores,
    classes_there,
    mask_of,
)
from glmix.tasks.pictures import painted

SHOWN = 3  # images of each kind
COLUMNS = ("what maps are spread by", "how", "threshold", "mIoU", "at 0.15", "best", "to the plain map")


@dataclass(frozen=True)
class Example:
    """A photo, and pictures of it under its masks, by their titles; the names of its classes."""

    title: str
    classes: str
    photo: Image.Image
    masks: dict[str, Image.Image]


def cells_of(row: Row) -> list[str]:
    """The cells of a row, under `COLUMNS`."""
    interval = f" ({row.low:+.1f} to {row.high:+.1f})" if row.low == row.low else ""  # of one image there is none
    gain = "" if row.name == PLAIN else f"{row.gain:+.1f}{interval}"
    shares = (f"{value:.1f}" for value in (row.miou, row.fixed, row.best))
    return [row.name, str(row.way), f"{row.threshold:.3f}", *shares, gain]


def extremes(gains: NDArray[np.float64]) -> dict[str, list[int]]:
    """Places of the images with the largest gains, those in the middle, and the largest losses."""
    order = np.argsort(-gains, kind="stable").tolist()
    count = min(SHOWN, len(order))
    middle = max(0, len(order) // 2 - count // 2)
    return {"most gained": order[:count], "in the middle": order[middle : middle + count], "most lost": order[-count:]}


def examples(seer: Seer, images: Source, rows_of_classes: dict[int, int], measured: Measured) -> list[Example]:
    """Photos of `extremes`, drawn by the plain map, through slots and through superpixels, as they were measured."""
    rows = {row.name: row for row in measured.rows if row.name in (PLAIN, SLOTS, SLIC)}
    found = []
    for kind, places in extremes(measured.gains).items():
        for place in places:
            photo, truth = bounded(*images.read(measured.reported[place])[:2])
            classes = classes_there(truth, rows_of_classes)
            wanted = {(name, row.way): name for name, row in rows.items()}
            masks = {"truth": np.where(truth == IGNORED, 0, truth)}
            numbers = [rows_of_classes[c] for c in classes]
            for key, scores in all_scores(seer, photo, truth.shape, numbers, only=wanted):
                masks[wanted[key]] = mask_of(scores, classes, rows[wanted[key]].threshold)
            drawn = {name: objects_painted(photo, mask, images.names) for name, mask in masks.items()}
            names = ", ".join(images.names[number] for number in classes)
            found.append(Example(f"{kind}: {measured.gains[place]:+.0f}", names, photo, drawn))
    return found


def objects_painted(photo: Image.Image, mask: NDArray[np.uint8], names: Sequence[str]) -> Image.Image:
    """As `painted`, with the background as it is and no legend."""
    picture = np.array(painted(photo, mask, names))[: photo.height, : photo.width]
    picture[mask == 0] = np.asarray(photo)[mask == 0]
    return Image.fromarray(picture)


def plot_examples(shown: Sequence[Example]) -> Figure:
    """A row for each example."""
    columns = len(shown[0].masks) + 1
    figure = Figure(figsize=(1.7 * columns, 1.8 * len(shown)), dpi=110, layout="constrained")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for line, example in zip(axes, shown, strict=True):
        pictures = {f"{example.title}\n{example.classes}": example.photo} | example.masks
        for axis, (title, picture) in zip(line, pictures.items(), strict=True):
            axis.imshow(np.asarray(picture))
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    return figure


def plot_thresholds(rows: Sequence[Row]) -> Figure:
    """mIoU of the rows over the background threshold."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axis = figure.subplots()
    for row in rows:
        axis.plot(THRESHOLDS, row.curve, label=row.name, linewidth=2 if row.name in (PLAIN, SLOTS) else 1)
    axis.set_xlabel("threshold of the background, in shares of a map's highest value")
    axis.set_ylabel("mIoU, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def write_weak_page(folder: Path, measured: Measured, shown: Sequence[Example], about: str, told: str) -> Path:
    """`report.html` in `folder`, and the pictures that it shows: examples.png and thresholds.png."""
    save_figure(plot_examples(shown), folder / "examples.png")
    kinds = [row for row in measured.rows if not row.name.startswith("stages.")]
    save_figure(plot_thresholds(kinds), folder / "thresholds.png")
    page = folder / "report.html"
    write_page(
        page,
        about,
        [
            paragraph(told),
            table(COLUMNS, map(cells_of, measured.rows)),
            heading("Where slots gain and where they lose"),
            paragraph(
                "By the mean IoU of each image's own pixels, through slots less that of the plain map, in points."
            ),
            image(folder / "examples.png", "Photos, their masks, and the masks from maps, plain and spread"),
            heading("Thresholds"),
            image(folder / "thresholds.png", "Mean IoU over the threshold of the background"),
        ],
    )
    return page
