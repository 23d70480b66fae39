"""All of a data set is read once, before hours are spent on it: what of it cannot be used, and why."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from glmix.data.class_lists import IGNORED
from glmix.data.images import BadImage, full_size
from glmix.data.samples import Sample, Skipped, Source


def check_samples(source: Source, look: Callable[[Sample], Any] = lambda sample: None) -> list[Skipped]:
    """The samples that cannot be read, in order: image or target missing, damaged, or not fitting each other.

    `look` is shown each of the others, from several threads at a time; it may raise BadImage.
    """

    def problem(index: int) -> Skipped | None:
        try:
            look(source.read(index))
        except BadImage as error:
            return Skipped(error.name, error.reason)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        return [found for found in pool.map(problem, range(len(source))) if found]


def check_maps(source: Source) -> list[Skipped]:
    """The pictures or maps that cannot be used; and where all maps together hold the first class alone, that.

    Masks of another size than their picture, numbers beyond the list of classes, and colours that it does not have are
    among what cannot be read.
    """
    seen = np.zeros(256, bool)

    def look(sample: Sample) -> None:
        width, height = full_size(sample.image)
        if sample.target.shape != (height, width):
            shape = sample.target.shape
            raise BadImage(
                sample.name, f"its map is of {shape[1]} x {shape[0]} pixels, the picture of {width} x {height}"
            )
        seen[np.unique(sample.target)] = True

    found = check_samples(source, look)
    if len(source) and seen[IGNORED] and len(source.classes) > 1 and not seen[1:IGNORED].any():
        found.append(Skipped("all masks", f"hold nothing but {source.classes[0]} and what is ignored; is 255 a class?"))
    return found
