"""What every data set is to this package: sources of samples, by number, and the splits they fall into."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from PIL import Image

from glmix.data.images import BadImage
from glmix.data.naming import find_splits, readable_names
from glmix.errors import UserError


class Skipped(NamedTuple):
    """Something of the data that is not used: its name, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


NOT_THERE = "picture that is not there"
TURNED = "turned by EXIF, and nothing tells whether its annotations are"
LOST = (NOT_THERE, TURNED)  # why a picture with annotations is left out whole
OTHER_SPLITS = "of no split that is used"


class Group(Skipped):
    """All that is not used for one reason, the first few named; `every` has the names of many more."""

    every: list[str]


class LeftOut:
    """Collects what is not used: counted by reason, and only the first few named, however many there are."""

    NAMED, KEPT, REASONS = 3, 10_000, 20

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        if reason not in self._counts and len(self._counts) >= self.REASONS:
            reason = "left out for other reasons"
        self._counts[reason] += count
        names = self._names.setdefault(reason, [])
        if len(names) < self.KEPT:
            names.append(name)

    def names(self) -> set[str]:
        """All that are kept, of any reason."""
        return {name for names in self._names.values() for name in names}

    def listed(self) -> list[Skipped]:
        """One `Group` for each reason."""
        found: list[Skipped] = []
        for reason, names in self._names.items():
            more = self._counts[reason] - min(len(names), self.NAMED)
            group = Group(", ".join(names[: self.NAMED]) + (f" and {more} more" if more > 0 else ""), reason)
            group.every = names
            found.append(group)
        return found


class Sample(NamedTuple):
    """An image, and what is to be learned of it: a class index, boxes and masks, a map; as the data's source has it."""

    image: Any  # PIL, and a tensor after a transform
    target: Any
    name: str = ""  # in the data set


class Pictures(Protocol):
    """Images by number, decoded to RGB when they are asked for.

    `pictures[i]` raises BadImage where image i cannot be used.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...

    def size(self, index: int) -> int:
        """Bytes of the file (or of what stands for it; 0 where that is not to be had, -1 where nothing is there)."""
        ...


@dataclass(frozen=True)
class Taken:
    """Some of a sequence, by number; read when they are asked for."""

    of: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.of[self.indices[index]]

    def size(self, index: int) -> int:
        return self.of.size(self.indices[index])

    def mark(self, index: int) -> str:
        return self.of.mark(self.indices[index]) if hasattr(self.of, "mark") else ""

    def take(self, indices: Sequence[int]) -> "Taken":
        return Taken(self.of, [self.indices[i] for i in indices])


@dataclass(frozen=True)
class Several:
    """Images that lie in several pictures, such as shards: `places` are each one's pictures and index there."""

    places: Sequence[tuple[Pictures, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Image.Image:
        pictures, place = self.places[index]
        return pictures[place]

    def size(self, index: int) -> int:
        pictures, place = self.places[index]
        return pictures.size(place)


def taken(sequence: Any, indices: Sequence[int]) -> Any:
    """Only what is at `indices`: of a list at once, of anything else when it is asked for."""
    if isinstance(sequence, list):
        return [sequence[i] for i in indices]
    return sequence.take(indices) if isinstance(sequence, Taken) else Taken(sequence, indices)


@dataclass(frozen=True)
class Source:
    """Images with a target each, by number.

    Attributes:
        files: a name of each in the data set, such as 'train/cat/1.jpg'; the same wherever the data lies.
        pictures: the images.
        targets: what is to be learned of each; a list of class indices, or what reads others when it is asked. The
            latter may have `mark(index)`, a text that differs where the target does, for the digest.
        classes: class labels (folder names, for instance), in the order of their indices.
    """

    files: list[str]
    pictures: Pictures
    targets: Any  # a sequence; what is no list need only have a length and items by number
    classes: list[str]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def info(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data beside its classes."""
        return {}

    @property
    def names(self) -> list[str]:
        """Class names for people."""
        return readable_names(self.classes)

    def read(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            BadImage: image or target cannot be used.
        """
        return Sample(self.pictures[index], self.targets[index], self.files[index])

    def each(
        self, skipped: list[Skipped], progress: Callable[[int, int], None] = lambda done, count: None
    ) -> Iterator[tuple[int, Sample]]:
        """Number and sample of all that can be read; what cannot goes to `skipped`. After each, `progress(done, count)`."""
        for index in range(len(self)):
            try:
                sample = self.read(index)
            except BadImage as error:
                skipped.append(Skipped(error.name, error.reason))
            else:
                yield index, sample
            progress(index + 1, len(self))

    def take(self, indices: Sequence[int]) -> "Source":
        """The source of only the samples at `indices`."""
        parts = {name: taken(getattr(self, name), indices) for name in ("files", "pictures", "targets")}
        return replace(self, **parts)

    def digest(self) -> str:
        """A hash of which samples these are: names, sizes, classes and order, wherever they lie."""
        result = hashlib.sha256()
        for i, name in enumerate(self.files):
            kind = self._label(i) or (self.targets.mark(i) if hasattr(self.targets, "mark") else "")
            result.update(f"{name}\t{self.pictures.size(i)}\t{kind}\n".encode(errors="surrogateescape"))
        return result.hexdigest()

    def _label(self, index: int) -> str:
        """The class of a sample that has one; else ''."""
        return self.classes[self.targets[index]] if isinstance(self.targets, list) else ""

    def fingerprints(self, sizes: bool = False) -> list[int]:
        """64 bits for each sample, of its class and its file's name below the class: what splits are made by.

        They stay when other samples come or go, or when the class folders lie below another folder. With `sizes` they
        are of the file's size too, and tell samples of other data that have the same names.
        """
        result = []
        for i, name in enumerate(self.files):
            label = self._label(i)
            _, folder, below = f"/{name}".partition(f"/{label}/")
            text = (f"{label}/{below if folder else name}" if label else name) + (
                f"\t{self.pictures.size(i)}" if sizes else ""
            )
            result.append(int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "big"))
        return result


@dataclass(frozen=True)
class DataSet:
    """All that a name of data stands for, read through once.

    Attributes:
        origin: the name, as it was given.
        whole: all samples.
        named: indices of the splits that the data itself names, 'train' and 'val'; empty where it names neither or
            one alone, which is then the whole. One of them where others lie beside it of which nobody knows what they
            are.
        left_out: what lies in it and is not used, with reasons.
        least_classes: that can be learned: a classifier needs two, a detector one.
    """

    origin: str
    whole: Source
    named: dict[str, list[int]] = field(default_factory=dict)
    left_out: list[Skipped] = field(default_factory=list)
    least_classes: int = 2

    @property
    def made(self) -> bool:
        """Whether the splits are made, a tenth of each class for validation, because the data names none."""
        return not self.named

    def split(self, split: str) -> Source:
        """The samples for `split` 'train' or 'val'.

        Raises:
            UserError: the data has no such split, no images, or a single class.
        """
        targets = self.whole.targets
        if len(self.named) == 2 and isinstance(targets, list):
            learned, held_out = ({targets[i] for i in self.named[name]} for name in ("train", "val"))
            if learned.isdisjoint(held_out) and learned and held_out:
                first, other = (self.whole.classes[min(found)] for found in (learned, held_out))
                raise UserError(
                    f"{self.origin}: no class is in both splits (train: {first} …; val: {other} …); "
                    "put validation images into folders of the same classes"
                )
        if not self.named:
            source = self.whole.take(made_split(self.whole, split))
            if len(self.whole) and not len(source):
                raise UserError(
                    f"{self.origin}: one image a class, which leaves none for {split}; add images, or a split"
                )
        elif split in self.named:
            source = self.whole.take(self.named[split])
        else:
            raise UserError(
                f"{self.origin}: no {split}/ folder beside {', '.join(self.named)}/; add one, "
                "or give a folder of class folders alone"
            )
        return self._checked(source, split, self.least_classes)

    def evaluation(self) -> Source:
        """The samples to evaluate on: the validation split that the data names, else all.

        Raises:
            UserError: no images.
        """
        named = self.named.get("val") or self.named.get("train")
        return self._checked(self.whole.take(named) if named else self.whole, "val", 1)

    def held_out(self, fingerprints: set[int]) -> Source | None:
        """The samples of these fingerprints, of sizes too; None where fewer than half are there: it is other data."""
        there = self.whole.fingerprints(sizes=True)
        if not fingerprints or 2 * len(fingerprints.intersection(there)) < len(fingerprints):
            return None
        return self.whole.take([i for i, value in enumerate(there) if value in fingerprints])

    def _checked(self, source: Source, split: str, least_classes: int) -> Source:
        if not len(source):
            found = f"; left out {self.left_out[0]}" if self.left_out else ""
            raise UserError(
                f"{self.origin}: no images for {split}; expected class folders with .jpg, .png, .webp … files in them"
                + found
            )
        if len(source.classes) < least_classes:
            raise UserError(f"{self.origin}: a single class ({source.classes[0]}); a classifier needs at least two")
        return source


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of `count` places (0: all), spread evenly over them; data is often in order of its classes."""
    chosen = min(limit or count, count)
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


def made_split(source: Source, split: str) -> list[int]:
    """Indices of 'train' or 'val' where the data has no splits: a tenth, of each class, chosen by the names alone.

    Of each class that has two samples at least one is held out, of one that has a single one none. Samples of one name
    stay together.
    """
    prints = source.fingerprints()
    by_class: dict[int, set[int]] = defaultdict(set)
    classed = isinstance(source.targets, list)
    for i, value in enumerate(prints):
        by_class[source.targets[i] if classed else 0].add(value)
    held: set[int] = set()
    for values in by_class.values():
        held.update(sorted(values)[: max(1, round(len(values) / 10)) if len(values) > 1 else 0])
    return [i for i, value in enumerate(prints) if (value in held) == (split == "val")]


def by_words(origin: str, whole: Source, words: Sequence[str], left_out: LeftOut) -> DataSet:
    """The data set whose samples have these split words ("" for none), without those of target -1, which have no label.

    One split alone is the whole.
    """
    labelled = [i for i in range(len(whole)) if whole.targets[i] >= 0]
    if len(labelled) < len(whole):
        for i in set(range(len(whole))) - set(labelled):
            left_out.add("without a label", whole.files[i])
        whole, words = whole.take(labelled), [words[i] for i in labelled]
    return in_splits(origin, whole, words, left_out)


def in_splits(
    origin: str, whole: Source, words: Sequence[str], left_out: LeftOut, least_classes: int = DataSet.least_classes
) -> DataSet:
    """The data set whose samples have these split words ("" for none). One split alone is the whole."""
    named = find_splits(words)
    used = set().union(*named.values())
    for i, name in enumerate(whole.files if named else []):
        if i not in used:
            left_out.add(f"{OTHER_SPLITS}, beside {' and '.join(named)}", name)
    if len(named) == 1:
        whole, named = whole.take(*named.values()), {}
    return DataSet(origin, whole, named, left_out.listed(), least_classes)
