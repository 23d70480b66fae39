"""What `--data` may name: class folders or a tar of them, shards, a table, a data set of the hub, or generated scenes."""

from pathlib import Path

from glmix.data.folders import scan_folders, walk
from glmix.data.hub import HUB, is_saved, scan_hub
from glmix.data.images import READABLE
from glmix.data.samples import DataSet, Source
from glmix.data.scenes import SCENES, scan_scenes
from glmix.data.shards import is_shard, scan_shards
from glmix.data.tables import ENDINGS, scan_table


def open_data(data: str | Path) -> DataSet:
    """The labelled images that `data` names, of whichever kind; read through once.

    Raises:
        UserError: nothing there, or nothing that can be read.
    """
    name, path = str(data), Path(data)
    if name == SCENES:
        return scan_scenes()
    if name.startswith(HUB):
        return scan_hub(name)
    if path.is_dir():
        tree = walk(path)
        if is_saved(tree):
            return scan_hub(name, tree)
        if not tree.ending_in(*READABLE, below=True):  # class folders stay that, whatever else is among them
            for ending, scan in ((".tar", scan_shards), (".parquet", scan_hub)):
                if tree.ending_in(ending):
                    return scan(name, tree)
        return scan_folders(name, tree)
    if not path.exists() and any(sign in name for sign in "{*?["):
        return scan_shards(name)
    suffix = path.suffix.lower()
    if suffix in ENDINGS:
        return scan_table(name)
    if suffix == ".parquet":
        return scan_hub(name)
    return scan_shards(name) if suffix == ".tar" and path.exists() and is_shard(name) else scan_folders(name)


def open_split(data: str | Path, split: str) -> Source:
    """The images of `data` for 'train' or 'val'.

    Raises:
        UserError: as of `open_data`; no images, or a single class.
    """
    return open_data(data).split(split)


def open_evaluation(data: str | Path) -> Source:
    """The images of `data` to evaluate on: its validation split where it has one, else all.

    Raises:
        UserError: as of `open_data`; no images.
    """
    return open_data(data).evaluation()
