"""Maps of classes, from image files."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from glmix.data.folders import Tree, read_tar, walk
from glmix.data.images import READABLE
from glmix.data.naming import split_word
from glmix.data.samples import DataSet, Source

IGNORED = 255


@dataclass(frozen=True)
class MapFiles:
    tree: Tree
    paths: list[str]
    classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.tree.opened(self.paths[index])) as file:
            found = np.array(file)
        found = np.where(found >= self.classes, IGNORED, found).astype(np.uint8)
        return found

    def mark(self, index: int) -> str:
        return self.paths[index]


def open_maps(name: str) -> DataSet:
    path = Path(name)
    tree = walk(path) if path.is_dir() else read_tar(path)
    masks = {}
    pictures = []
    for file in tree.files:
        if not file.lower().endswith(READABLE):
            continue
        folder = PurePosixPath(file).parent.name.lower()
        if re.search("(annot|mask|label)", folder):
            masks[folder.replace("annot", ""), PurePosixPath(file).stem] = file
        else:
            pictures.append(file)
    pairs = [(p, masks.get((PurePosixPath(p).parent.name.lower(), PurePosixPath(p).stem))) for p in pictures]
    pairs = [(p, m) for p, m in pairs if m]
    text = tree.opened(next(f for f in tree.files if f.endswith("classes.txt")))
    lines = (text.read_bytes() if isinstance(text, Path) else text.read()).decode().splitlines()
    classes = [re.split(r"[\s,;]+", re.sub(r"^\d+\s+", "", line))[0] for line in lines if line.strip()]
    classes = [name for name in classes if name.lower() not in ("unlabelled", "void")]
    whole = Source(
        [p for p, _ in pairs],
        tree.pictures([p for p, _ in pairs]),
        MapFiles(tree, [m for _, m in pairs], len(classes)),
        classes,
    )
    words = [split_word(PurePosixPath(p).parent.name) for p, _ in pairs]
    from glmix.data.naming import find_splits

    named = find_splits(words)
    return DataSet(name, whole, named, [], least_classes=1)
