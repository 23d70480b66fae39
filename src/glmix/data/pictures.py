"""Images without labels, of whatever a command is given: files, folders, patterns, tars, tables, parquet, the hub."""

import glob
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from glmix.data.folders import FolderPictures, Tree, read_tar, walk
from glmix.data.hub import HUB, hub_pictures, is_saved
from glmix.data.samples import Pictures, Source
from glmix.data.scenes import SCENES, scan_scenes
from glmix.data.tables import ENDINGS, listed_paths
from glmix.errors import UserError

LISTED = "-"  # stands for names on standard input

Part = tuple[list[str], Pictures]  # names, as they are told, and images


@dataclass(frozen=True)
class Chained:
    """Images of several parts, one after the other."""

    parts: Sequence[Pictures]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", list(accumulate(map(len, self.parts))))

    def __len__(self) -> int:
        return self.ends[-1] if self.parts else 0  # type: ignore[attr-defined]

    def _place(self, index: int) -> tuple[Pictures, int]:
        ends: list[int] = self.ends  # type: ignore[attr-defined]
        number = bisect_right(ends, index)
        return self.parts[number], index - (ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Image.Image:
        part, place = self._place(index)
        return part[place]

    def size(self, index: int) -> int:
        part, place = self._place(index)
        return part.size(place)


@dataclass(frozen=True)
class NoTargets:
    """As many targets as there are images, none of which is known."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return None


def open_pictures(names: Sequence[str]) -> Source:
    """The images of all that is named, in that order; within a folder in the order of their names.

    Args:
        names: image files; folders, with all that lies below them; patterns such as 'photos/**/*.jpg'; tars; tables with a
            column of paths, or a path a line; .parquet; 'hf:OWNER/NAME'; 'scenes'; '-' for paths on standard input.

    Raises:
        UserError: something that stands for several images has none. A file that is missing is found when it is read.
    """
    parts = [part for name in names for part in pictures_of(name)]
    files = [file for found, _ in parts for file in found]
    if not files:
        raise UserError(f"{' '.join(names)}: no images")
    return Source(files, Chained([pictures for _, pictures in parts]), NoTargets(len(files)), [])


def pictures_of(name: str) -> Iterator[Part]:
    """The images that one name stands for."""
    path = Path(name)
    if name == LISTED:
        paths = [line.rstrip("\r\n") for line in sys.stdin]
        yield files_at([line for line in paths if line])
    elif name == SCENES:
        scenes = scan_scenes().whole
        yield scenes.files, scenes.pictures
    elif name.startswith(HUB):
        yield from hub_pictures(name)
    elif re.match(r"https?://", name):
        raise UserError(f"{name}: an address; fetch the file first, and name that")
    elif path.is_dir():
        yield from within(name, walk(path))
    elif not path.exists() and glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"{name}: no file is called like that")
        whole = [one for one in found if not os.path.isdir(one) or "**" not in name]  # `**` has what is in them already
        yield from (part for one in whole for part in pictures_of(one))
    elif path.suffix.lower() in ENDINGS and path.is_file():
        yield files_at([os.path.join(os.path.dirname(name), one) for one in listed_paths(name)])
    elif path.suffix.lower() == ".parquet":
        yield from hub_pictures(name)
    elif path.suffix.lower() == ".tar" and path.is_file():
        yield from within(name, read_tar(path))
    else:
        yield files_at([name])


def within(name: str, tree: Tree) -> Iterator[Part]:
    """The images in a folder or tar; where there are none, those of the tars or parquet files in it."""
    if is_saved(tree):
        yield from hub_pictures(name, tree)
        return
    found = tree.images()
    if found:
        yield [f"{name.rstrip('/')}/{one}" for one in found], tree.pictures(found)
    elif tree.spans is None and tree.ending_in(".parquet"):
        yield from hub_pictures(name, tree)
    elif tree.spans is None and tree.ending_in(".tar"):
        yield from (part for one in tree.ending_in(".tar") for part in pictures_of(os.path.join(name, one)))
    else:
        others = f"; left out {left[0]}" if (left := tree.left_out.listed()) else ""
        raise UserError(f"{name}: no images in it (files such as a.jpg or b.png){others}")


def files_at(paths: list[str]) -> Part:
    """Files by their paths."""
    return paths, FolderPictures(Path(), paths)
