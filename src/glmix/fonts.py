"""Fonts for words of any script: whatever a machine has draws them, and what it has not becomes a box, without warnings.

DejaVu Sans comes with matplotlib, and has most alphabets; for what it lacks, such as Chinese, the fonts that are
installed are searched, once.
"""

import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageFont

USUAL = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache
def drawn_by(path: str) -> frozenset[int]:
    """Code points that a font file has; none of one that cannot be used at every size, as those of coloured pictures."""
    with suppress(Exception):  # any kind, of a damaged file
        font = FT2Font(path)
        if font.scalable:
            return frozenset(font.get_charmap())
    return frozenset()


@lru_cache(10_000)
def file_with(character: str) -> str:
    """The file of a font that has `character`; '' where no installed one has it."""
    fonts = {entry.fname for entry in fontManager.ttflist if entry.style == "normal"}
    installed = sorted(fonts, key=lambda path: ("LastResort" in path, path))  # matplotlib's font of boxes
    return next((path for path in (str(USUAL), *installed) if ord(character) in drawn_by(path)), "")


def files_for(text: str) -> list[str]:
    """Fonts that together have all of `text` that can be drawn here; the usual one first."""
    return list(dict.fromkeys([str(USUAL), *filter(None, (file_with(c) for c in dict.fromkeys(text) if ord(c) > 127))]))


@lru_cache
def opened(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size)


def pen_font(text: str, size: int) -> Any:
    """Pillow's font that draws most of `text`, at `size` pixels; what it lacks it draws as a box."""
    wanted = [ord(c) for c in text]
    return opened(max(files_for(text), key=lambda path: sum(c in drawn_by(path) for c in wanted)), size)


def draw_figure(figure: Figure, file: IO[bytes], kind: str) -> None:
    """`figure` in a format, such as 'png', its words in fonts that have them."""
    names = {entry.fname: entry.name for entry in fontManager.ttflist}
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        others = [names[path] for path in files_for(text.get_text())[1:] if path in names]
        if others:
            text.set_fontfamily([names.get(str(USUAL), "DejaVu Sans"), *others])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing")
        figure.savefig(file, format=kind)
