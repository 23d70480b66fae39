"""docs/dense.png: what a detector and a segmenter of generated scenes find, where it is easy and where it is not.

    python scripts/draw_dense.py DETECTOR SEGMENTER docs/dense.png [NUMBER ...]

Rows: the detector's boxes, the segmenter's classes, and what is right; columns: scenes of validation by their numbers.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from glmix.models import load
from glmix.slots.figures import save_figure
from glmix.tasks import task_named
from glmix.tasks.pictures import colour_of, painted
from glmix.use.predictions import found_in

TYPICAL_AND_WORST = (0, 1, 2, 406, 572, 657)


def main(detector: str, segmenter: str, out: str, *numbers: str) -> None:
    """Draw the figure."""
    asked = [int(number) for number in numbers] or list(TYPICAL_AND_WORST)
    loaded = [load(name) for name in (detector, segmenter)]
    maps = task_named("segment").open("scenes").split("val")
    figure = Figure(figsize=(1.7 * len(asked), 5.6), dpi=90, layout="constrained")
    axes = figure.subplots(3, len(asked), squeeze=False)
    for column, number in zip(axes.T, asked, strict=True):
        sample = maps.read(number)
        drawn = [found_in(task_named(said.task), model, said, sample.image) for model, said in loaded]
        drawn.append(painted(sample.image, sample.target, loaded[1][1].names))
        for axis, picture in zip(column, drawn, strict=True):
            axis.imshow(np.asarray(picture)[: picture.width])  # scenes are square; below them are legends
            axis.set_axis_off()
        column[0].set_title(f"scene {number}", fontsize=8)
    names = loaded[1][1].names
    colours = [Patch(color=[part / 255 for part in colour_of(i)], label=name) for i, name in enumerate(names)]
    figure.legend(handles=colours, loc="outside lower center", ncols=len(names), fontsize=7, frameon=False)
    save_figure(figure, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
