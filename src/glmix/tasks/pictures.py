"""What dense tasks found, drawn into the picture, with a legend."""

import colorsys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHARE = 0.55  # of a mask's colour in a painted pixel
ROW = 18  # pixels of a line of the legend


def colour_of(index: int) -> tuple[int, int, int]:
    """A colour for a class: hues by the golden ratio, so that neighbours in the list are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.61803 * index % 1, 0.85 if index % 2 else 0.6, 0.95 if index % 3 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def painted(picture: Image.Image, classes: NDArray[np.integer], names: Sequence[str]) -> Image.Image:
    """A picture under the colours of its pixels' classes (H, W), with the names of those that are there."""
    table = np.array([colour_of(i) for i in range(len(names))], np.float32)
    mixed = (1 - SHARE) * np.asarray(picture.convert("RGB"), np.float32) + SHARE * table[classes]
    counts = np.bincount(classes.ravel(), minlength=len(names))
    there = sorted(np.flatnonzero(counts).tolist(), key=lambda i: -int(counts[i]))
    return with_legend(Image.fromarray(mixed.round().astype(np.uint8)), [(names[i], colour_of(i)) for i in there])


def with_legend(picture: Image.Image, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """A picture with a legend on white below it, in as many columns as there is room for."""
    font = ImageFont.load_default(12)
    widest = max([round(font.getlength(name)) for name, _ in entries] + [1]) + 2 * ROW
    columns = max(1, picture.width // widest)
    rows = -(-len(entries) // columns)
    result = Image.new("RGB", (picture.width, picture.height + rows * ROW + (4 if rows else 0)), "white")
    result.paste(picture)
    pen = ImageDraw.Draw(result)
    for i, (name, colour) in enumerate(entries):
        x, y = i % columns * widest + 4, picture.height + i // columns * ROW + 4
        pen.rectangle((x, y, x + 10, y + 10), fill=colour, outline="black")
        pen.text((x + 15, y - 2), name, fill="black", font=font)
    return result
