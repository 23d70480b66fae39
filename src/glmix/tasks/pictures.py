"""Pictures of what was found: boxes, masks and a legend over the photo."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from glmix.data.objects import decoded, run_lengths

SHORTEST = 480  # pixels: least longer side of a picture, so that its text can be read
COLOURS = [tuple(round(255 * part) for part in colour) for colour in colormaps["tab10"].colors]  # type: ignore[attr-defined]
COVER = 0.45  # opacity of a mask


def draw_objects(photo: Image.Image, answers: list[dict[str, Any]], least_score: float) -> Image.Image:
    """A photo with the objects that are as sure as `least_score`; a legend below tells the classes and how many of each.

    Args:
        photo: as it was given to the network.
        answers: of the detection task: `name`, `category_id`, `bbox` in pixels of the file, `score`, `segmentation`.
        least_score: from 0 to 1.
    """
    shown = [answer for answer in answers if answer["score"] >= least_score]
    scale = max(1.0, SHORTEST / max(photo.size))
    size = (round(photo.width * scale), round(photo.height * scale))
    picture = photo.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, np.float32).copy()
    for answer in shown[::-1]:
        if "segmentation" in answer:
            runs = answer["segmentation"]
            mask = Image.fromarray(255 * decoded(run_lengths(runs, tuple(runs["size"])))).resize(size)
            inside = np.asarray(mask) > 127
            pixels[inside] += COVER * (np.array(colour_of(answer), np.float32) - pixels[inside])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    full = photo.info.get("full_size", photo.size)
    factors = size[0] / full[0], size[1] / full[1]
    for answer in shown[::-1]:
        x, y, width, height = answer["bbox"]
        x0, y0, x1, y1 = x * factors[0], y * factors[1], (x + width) * factors[0], (y + height) * factors[1]
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour_of(answer), width=2)
        text = f"{answer['score']:.2f}"
        place = (x0 + 3, max(0, y0 - 16) if y0 >= 16 else y0 + 2)
        draw.rectangle(draw.textbbox(place, text, font=font), fill=colour_of(answer))
        draw.text(place, text, fill="white", font=font)
    return with_legend(picture, shown)


def colour_of(answer: dict[str, Any]) -> tuple[int, ...]:
    """The colour of an object's class, the same in all pictures."""
    return COLOURS[answer["category_id"] % len(COLOURS)]


def with_legend(picture: Image.Image, shown: list[dict[str, Any]]) -> Image.Image:
    """A picture above the names of the classes in their colours, with the number of objects of each."""
    names = [answer["name"] for answer in shown]
    entries = {answer["name"]: colour_of(answer) for answer in shown}
    font = ImageFont.load_default(16)
    rows: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    used = 0
    for name, colour in entries.items() or {"nothing found": (128, 128, 128)}.items():
        text = f"{name}  {names.count(name)}" if name in names else name
        width = round(font.getlength(text)) + 44
        if used + width > picture.width and rows[-1]:
            rows.append([])
            used = 0
        rows[-1].append((text, colour, used))
        used += width
    whole = Image.new("RGB", (picture.width, picture.height + 26 * len(rows) + 4), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for i, row in enumerate(rows):
        y = picture.height + 26 * i + 4
        for text, colour, x in row:
            draw.rectangle((x + 8, y + 4, x + 22, y + 18), fill=colour)
            draw.text((x + 28, y + 2), text, fill="black", font=font)
    return whole
