"""What `--data` may name: a folder, a tar, or the generated scenes."""

from glmix.data.images import load_evaluation, load_split
from glmix.data.loading import Images
from glmix.data.scenes import scene_split

SCENES = "scenes"


def open_split(data: str, split: str) -> Images:
    """The 'train' or 'val' images of `data`."""
    return scene_split(split) if data == SCENES else load_split(data, split)


def open_evaluation(data: str) -> Images:
    """The images of `data` to evaluate on: its validation split where it has one, else all."""
    return scene_split("val") if data == SCENES else load_evaluation(data)
