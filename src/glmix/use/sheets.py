"""Contact sheets: pictures in rows, with what is said of each below it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from glmix.errors import UserError
from glmix.files import readable, written_whole
from glmix.fonts import pen_font

MOST = 96  # pictures of a sheet
COLUMNS = 8
SIDE, GAP, LINE, SIZE = 192, 8, 15, 12  # pixels: of a picture's longer side, between pictures, of a line, of letters

Box = tuple[float, float, float, float]  # x, y, width, height, in shares of the picture's sides


class Cell(NamedTuple):
    """A picture, what is said of it, and boxes in it."""

    picture: Image.Image
    lines: Sequence[str]
    boxes: Sequence[Box] = ()


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy that fits into a cell."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def check_picture(option: str, path: Path) -> None:
    """Raise a UserError where no picture can be written by that name."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"{option} {path}: its ending says the format; there are .png, .jpg, .webp")


def draw_sheet(cells: Iterable[Cell], path: Path) -> None:
    """Write the sheet; the cells' pictures are thumbnails."""
    found = list(cells)
    lines = max((len(cell.lines) for cell in found), default=0)
    width, height = SIDE + GAP, SIDE + lines * LINE + GAP
    rows, columns = max(1, -(-len(found) // COLUMNS)), max(1, min(COLUMNS, len(found)))
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for place, cell in enumerate(found):
        x, y = GAP + place % COLUMNS * width, GAP + place // COLUMNS * height
        sheet.paste(cell.picture, (x, y))
        w, h = cell.picture.size
        for left, top, wide, high in cell.boxes:
            corners = (x + left * w, y + top * h, x + min(1, left + wide) * w - 1, y + min(1, top + high) * h - 1)
            pen.rectangle(corners, outline=(255, 60, 0), width=2)
        for number, line in enumerate(cell.lines):
            pen.text((x, y + SIDE + number * LINE), fitting(readable(line)), fill="black", font=pen_font(line, SIZE))
    with written_whole(path) as file:
        sheet.save(file, {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG"))


def fitting(text: str) -> str:
    """As much of the end of a text as fits below a picture."""
    if pen_font(text, SIZE).getlength(text) <= SIDE:
        return text
    while text and pen_font(text, SIZE).getlength(f"…{text}") > SIDE:
        text = text[1:]
    return f"…{text}"
