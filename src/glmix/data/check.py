"""All of a data set is read once, before hours are spent on it: what of it cannot be used, and why."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glmix.data.class_lists import IGNORED
from glmix.data.images import BadImage, full_size
from glmix.data.samples import Sample, Skipped, Source

NAMED = 8  # classes of a kind that are told by name


@dataclass
class Checked:
    """What was found when all samples of a source were read.

    Attributes:
        unusable: the samples that cannot be read: image or target missing, damaged, or not fitting each other.
        notes: what looks odd, and can be used.
        classes: indices of the classes that are there.
    """

    unusable: list[Skipped] = field(default_factory=list)
    notes: list[Skipped] = field(default_factory=list)
    classes: set[int] = field(default_factory=set)


def check_samples(source: Source, look: Callable[[Sample], Any] = lambda sample: None) -> Checked:
    """Read every sample. `look` is shown each, from several threads at a time; it may raise BadImage."""

    def problem(index: int) -> Skipped | None:
        try:
            look(source.read(index))
        except BadImage as error:
            return Skipped(error.name, error.reason)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        return Checked([found for found in pool.map(problem, range(len(source))) if found])


def check_objects(source: Source) -> Checked:
    """As `check_samples`, of pictures with objects."""
    seen: set[int] = set()
    found = check_samples(source, lambda s: seen.update(s.target.labels[s.target.learned(masks=False)].tolist()))
    found.classes = seen
    return found


def check_maps(source: Source) -> Checked:
    """As `check_samples`, of pictures with maps; and what is odd about all maps together.

    Masks of another size than their picture, numbers beyond the list of classes, and colours that it does not have are
    among what cannot be read.
    """
    seen = np.zeros(256, bool)
    like_binary: list[str] = []

    def look(sample: Sample) -> None:
        width, height = full_size(sample.image)
        if sample.target.shape != (height, width):
            shape = sample.target.shape
            raise BadImage(
                sample.name, f"its map is of {shape[1]} x {shape[0]} pixels, the picture of {width} x {height}"
            )
        there = np.unique(sample.target)
        seen[there] = True
        if there.tolist() in ([0, IGNORED], [IGNORED]):
            like_binary.append(sample.name)

    found = check_samples(source, look)
    found.classes = set(np.flatnonzero(seen[:IGNORED]).tolist())
    if len(source) and seen[IGNORED] and len(source.classes) > 1 and not seen[1:IGNORED].any():
        found.unusable.append(
            Skipped("all masks", f"hold nothing but {source.classes[0]} and what is ignored; is 255 a class?")
        )
    elif like_binary and len(source.classes) == 2:
        what = f"{len(like_binary)} of {len(source)} masks hold nothing but {source.classes[0]} and what is ignored"
        found.notes.append(Skipped(min(like_binary), f"{what}; is 255 {source.classes[1]} there?"))
    return found


def gaps(classes: Sequence[str], learned: set[int], held_out: set[int] | None = None) -> list[Skipped]:
    """The classes that cannot be learned or measured, as none of the images has them."""
    missing = set(range(len(classes))) - learned
    found = []
    for those, what in (
        (missing & (held_out or set()), "not in any training image, but in validation"),
        (missing - (held_out or set()), "not in any image" if held_out is None else "not in any training image"),
        (learned - held_out if held_out else set(), "not in any validation image"),
    ):
        if those:
            named = [classes[i] for i in sorted(those)]
            more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
            word = "class" if len(named) == 1 else "classes"
            found.append(Skipped(f"{word} {', '.join(named[:NAMED])}{more}", what))
    return found
