"""What dense tasks found, drawn into the picture, with a legend."""

import colorsys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SHARE = 0.55  # of a mask's colour in a painted pixel
SHORTEST = 480  # pixels: least longer side of a picture with objects
ROW = 18  # pixels of a line of the legend


def colour_of(index: int) -> tuple[int, int, int]:
    """A colour for a class: hues by the golden ratio, so that neighbours in the list are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(0.61803 * index % 1, 0.85 if index % 2 else 0.6, 0.95 if index % 3 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture that is at least `SHORTEST` pixels long, of one of this `size`."""
    scale = max(1.0, SHORTEST / max(size))
    return round(size[0] * scale), round(size[1] * scale)


def painted(picture: Image.Image, classes: NDArray[np.integer], names: Sequence[str]) -> Image.Image:
    """A picture under the colours of its pixels' classes (H, W), with the names of those that are there."""
    table = np.array([colour_of(i) for i in range(len(names))], np.float32)
    mixed = (1 - SHARE) * np.asarray(picture.convert("RGB"), np.float32) + SHARE * table[classes]
    counts = np.bincount(classes.ravel(), minlength=len(names))
    there = sorted(np.flatnonzero(counts).tolist(), key=lambda i: -int(counts[i]))
    return with_legend(Image.fromarray(mixed.round().astype(np.uint8)), [(names[i], colour_of(i)) for i in there])


def outlined(
    picture: Image.Image,
    objects: Sequence[tuple[int, float, Sequence[float]]],
    masks: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
) -> Image.Image:
    """A picture with boxes, masks and scores; the legend counts the objects of each class.

    Args:
        picture: of any size; small ones are drawn larger, so that scores can be read.
        objects: class index, score and box (x0, y0, x1, y1 in shares of the sides) of each, the surest first.
        masks: of each, or none at all; (H, W) of any size of the picture's aspect.
        names: of the classes.
    """
    width, height = size = enlarged(picture.size)
    pixels = np.array(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    for (kind, _, _), mask in reversed(list(zip(objects, masks, strict=False))):
        inside = np.asarray(Image.fromarray(255 * mask).resize(size)) > 127
        pixels[inside] = (1 - SHARE) * pixels[inside] + SHARE * np.array(colour_of(kind), np.float32)
    result = Image.fromarray(pixels.round().astype(np.uint8))
    pen, font = ImageDraw.Draw(result), ImageFont.load_default(12)
    for kind, score, (x0, y0, x1, y1) in reversed(objects):
        left, top = x0 * width, y0 * height
        pen.rectangle(
            (left, top, max(left, x1 * width - 1), max(top, y1 * height - 1)), outline=colour_of(kind), width=2
        )
        place, text = (left + 3, top - 14 if top >= 14 else top + 2), f"{score:.2f}"
        pen.rectangle(pen.textbbox(place, text, font=font), fill=colour_of(kind))
        pen.text(place, text, fill="black", font=font)
    counts = Counter(kind for kind, _, _ in objects)
    return with_legend(result, [(f"{names[kind]}: {count}", colour_of(kind)) for kind, count in counts.most_common()])


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
