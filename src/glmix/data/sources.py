"""What `--data` may name: class folders or a tar of them, shards, a table, a data set of the hub, or generated scenes."""

import os
from collections.abc import Callable
from pathlib import Path

from glmix.data.hub import HUB, scan_hub
from glmix.data.images import SUFFIXES, ImageSet, checked, load_evaluation, load_split, made_split
from glmix.data.loading import Images
from glmix.data.samples import find_splits
from glmix.data.scenes import scene_split
from glmix.data.shards import is_shard, scan_shards
from glmix.data.tables import scan_csv

SCENES = "scenes"


def open_split(data: str, split: str) -> Images:
    """The 'train' or 'val' images of `data`. Where it does not name both, they are made as in `load_split`.

    Raises:
        UserError: nothing there, nothing that can be read, no images, or a single class.
    """
    if data == SCENES:
        return scene_split(split)
    scan = _scanner(data)
    if scan is None:
        return load_split(data, split)
    images, splits = _scan(scan, data)
    if not splits:
        splits = {split: made_split(images.files, split)}
    return checked(images.take(splits[split]), data, split)


def open_evaluation(data: str) -> Images:
    """The images of `data` to evaluate on: its validation split where it has one, else all.

    Raises:
        UserError: nothing there, nothing that can be read, or no images.
    """
    if data == SCENES:
        return scene_split("val")
    scan = _scanner(data)
    if scan is None:
        return load_evaluation(data)
    images, splits = _scan(scan, data)
    return checked(images.take(splits["val"]) if splits else images, data, "val", least_classes=1)


Scan = Callable[[str], tuple[ImageSet, list[str]]]


def _scan(scan: Scan, data: str) -> tuple[ImageSet, dict[str, list[int]]]:
    """The images of `data` and the indices of its two splits; none where it names one at most, which is then all."""
    images, words = scan(data)
    splits = find_splits(words)
    if len(splits) == 1:
        return images.take(*splits.values()), {}
    return images, splits


def _scanner(data: str) -> Scan | None:
    """What reads `data`; None for class folders, whatever else is among them, and for a tar of them."""
    path, suffix = Path(data), Path(data).suffix.lower()
    if data.startswith(HUB):
        return scan_hub
    if path.is_dir():
        if _holds(path, SUFFIXES, below=True):
            return None
        if _holds(path, (".tar",)):
            return scan_shards
        return scan_hub if _holds(path, (".parquet",)) else None
    if path.exists():
        if suffix == ".tar" and is_shard(data):
            return scan_shards
    elif any(sign in data for sign in "{*?["):
        return scan_shards
    return {".csv": scan_csv, ".parquet": scan_hub}.get(suffix)


def _holds(root: Path, suffixes: tuple[str, ...], below: bool = False) -> bool:
    """Whether there are such files in a folder or, for `below`, in folders in it."""
    walk = ((Path(folder), names) for folder, _, names in os.walk(root, followlinks=True))
    return any(
        name.lower().endswith(suffixes) for folder, names in walk for name in names if folder != root or not below
    )
