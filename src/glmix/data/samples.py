"""What shards, tables and the hub's data sets share: labels to class indices, names of splits, and images by place."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from glmix.data.images import SPLITS, ImageSet
from glmix.errors import UserError

Label = int | str


class Reader(Protocol):
    """One shard, or one table."""

    def read(self, index: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class SampleSet(ImageSet):
    """Labelled images that lie in several places; `places` are each one's reader and index there."""

    places: Sequence[tuple[Reader, int]]

    def read(self, index: int) -> Image.Image:
        """The image at `index`, decoded.

        Raises:
            BadImage: it cannot be read or decoded.
        """
        reader, place = self.places[index]
        return reader.read(place)

    def take(self, indices: list[int]) -> "SampleSet":
        """The set of only the images at `indices`."""
        files, labels = [self.files[i] for i in indices], [self.labels[i] for i in indices]
        return replace(self, files=files, labels=labels, places=[self.places[i] for i in indices])


def number_labels(labels: Sequence[Label], classes: list[str] | None, source: str) -> tuple[list[int], list[str]]:
    """Class index of each label, and the classes' names.

    Args:
        labels: names, or numbers.
        classes: the known names, which numbers count from 0; without them each different label is a class, numbers in
            their order before texts in theirs.
        source: what to name in errors.

    Raises:
        UserError: a label that is none of `classes`.
    """
    if classes is None:
        found = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
        index = {label: i for i, label in enumerate(found)}
        classes = [str(label) for label in found]
    else:
        index = {name: i for i, name in enumerate(classes)} | {i: i for i in range(len(classes))}
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        raise UserError(f"{source}: label {unknown!r} is none of the {len(classes)} classes listed; correct the list")
    return [index[label] for label in labels], classes


def split_word(text: str) -> str:
    """The last word in a path or name that means a split, as "val" in "shards/in1k-val-003.tar"; "" if none does."""
    known = {name for names in SPLITS.values() for name in names}
    return next((word for word in reversed(re.findall("[a-z]+", text.lower())) if word in known), "")


def find_splits(words: Sequence[str]) -> dict[str, list[int]]:
    """Indices of 'train' and 'val', or of the one of them that is there, or of neither, by `split_word` of each image.

    Where several words mean validation, the first in `SPLITS` is taken: a test set beside a validation set is left out.
    """
    there = set(words)
    chosen = {split: next((name for name in names if name in there), None) for split, names in SPLITS.items()}
    return {split: [i for i, w in enumerate(words) if w == word] for split, word in chosen.items() if word}


def pick_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column called by the first of `names` that any is called by, in capitals or not."""
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in names if name in lower), None)
