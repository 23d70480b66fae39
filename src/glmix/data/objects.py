"""Objects in pictures: boxes, and masks where the data has any; what every reader of such data makes."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glmix.data.folders import Tree
from glmix.data.images import READABLE, BadImage, full_size
from glmix.data.samples import DataSet, LeftOut, Sample, Skipped, Source, in_splits
from glmix.errors import UserError, needs

REACH = 2.0  # pixels: how far a box may reach outside its picture without a word
THIN = 2.0  # pixels: sides of a polygon in which there may be no pixel
STRAYING = 0.1  # share of the objects of which something may be odd: beyond that all mean something else

Size = tuple[int, int]  # height and width, in pixels


class Row(NamedTuple):
    """An object as a data set has it.

    Attributes:
        label: class index.
        box: x0, y0, x1, y1; in pixels, or in shares of the sides where the record has no size. As the data has it.
        crowd: whether it is a group, or too difficult: neither learned nor counted.
        area: in pixels, if the data says.
        segmentation: polygons, or run lengths as COCO has them; None where there is none.
        id: by which the data knows it.
    """

    label: int
    box: list[float]
    crowd: bool = False
    area: float | None = None
    segmentation: Any = None
    id: Any = 0


class Record(NamedTuple):
    """The objects of a picture, and the size that they are meant for; None where they are in shares of the sides."""

    size: Size | None
    rows: list[Row]


class Records:
    """Records by number. Each is kept as text: a million small objects would be copied by every loading process."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._texts = [json.dumps(record, separators=(",", ":")).encode() for record in records]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Record:
        size, rows = json.loads(self._texts[index])
        return Record(tuple(size) if size else None, [Row(*row) for row in rows])

    def mark(self, index: int) -> str:
        return hashlib.sha256(self._texts[index]).hexdigest()[:16]


@dataclass(frozen=True)
class Objects:
    """The objects of a picture that was read.

    Attributes:
        size: height and width of the picture that all else is told in; the file's, upright.
        told: (n, 4) x0, y0, x1, y1 in pixels, as the data has them: some reach over the edge a little.
        boxes: the same, cut to the picture.
        labels: (n,) class indices.
        crowd: (n,) whether each is a group, neither learned nor counted.
        areas: (n,) in pixels: what the data says, else the mask's, else the box's.
        segmentations: polygons or run lengths of each; None where there is none.
    """

    size: Size
    told: NDArray[np.float64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    segmentations: list[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def learned(self, masks: bool) -> NDArray[np.bool_]:
        """(n,) which are learned: no groups, and where masks are, none without one."""
        bare = np.array([masks and each is None for each in self.segmentations], np.bool_)
        return ~self.crowd & ~bare

    def masks(self, which: Sequence[int]) -> NDArray[np.uint8]:
        """Masks (n, H, W) of some of them, 0 and 1."""
        found = [decoded(run_lengths(self.segmentations[i], self.size)) for i in which]
        return np.stack(found) if found else np.zeros((0, *self.size), np.uint8)


@dataclass(frozen=True)
class ObjectSource(Source):
    """Pictures whose targets are `Objects`.

    Attributes:
        category_ids: by which the data knows each of the classes.
        order: class index of each label of the records, where it is another.
    """

    category_ids: list[int] = field(default_factory=list)
    order: list[int] | None = None

    @property
    def info(self) -> dict[str, Any]:
        return {"category_ids": self.category_ids}

    def read(self, index: int) -> Sample:
        """The picture at `index`, and its objects.

        Raises:
            BadImage: it cannot be read, or its objects are told for a picture of another size.
        """
        sample = super().read(index)
        objects = objects_of(sample.target, sample.image, sample.name)
        if self.order is not None:
            objects = replace(objects, labels=np.array(self.order, np.int64)[objects.labels])
        return sample._replace(target=objects)


def objects_of(record: Record, picture: Image.Image, name: str) -> Objects:
    """The objects of a picture as it stands upright; those that were told for the file's unturned pixels are turned.

    Raises:
        BadImage: they are for a picture of another size, or nothing tells whether for the turned or the unturned one.
    """
    width, height = full_size(picture)
    orientation = picture.info.get("orientation", 1)
    rows, size = record.rows, (height, width)
    if record.size is None:
        sides = np.array([width, height, width, height])
        told = np.array([row.box for row in rows]).reshape(-1, 4) * sides
        segmentations = [_scaled(row.segmentation, width, height) for row in rows]
    else:
        unturned = size if orientation < 5 else (width, height)
        if record.size not in (size, unturned):
            told = "its annotations are for {1} x {0}".format(*record.size)
            raise BadImage(name, f"is {width} x {height} pixels, {told}")
        if orientation > 1 and size == unturned:
            raise BadImage(
                name,
                f"is turned by EXIF (orientation {orientation}), and nothing tells whether its annotations are; "
                "save it upright, without EXIF",
            )
        told = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
        segmentations = [row.segmentation for row in rows]
        if record.size != size:
            turn = exif_turn(orientation, record.size)
            told = turn(told.reshape(-1, 2, 2)).reshape(-1, 2, 2)
            told = np.concatenate([told.min(1), told.max(1)], 1).reshape(-1, 4)
            segmentations = [_turned(s, orientation, record.size) for s in segmentations]
    boxes = np.clip(told, 0, [width, height, width, height])
    areas = [
        row.area if row.area is not None else _area(segmentation, box, size)
        for row, segmentation, box in zip(rows, segmentations, boxes, strict=True)
    ]
    return Objects(
        size,
        told,
        boxes,
        np.array([row.label for row in rows], np.int64),
        np.array([row.crowd for row in rows], np.bool_),
        np.array(areas, np.float64),
        segmentations,
    )


def _area(segmentation: Any, box: Any, size: Size) -> float:
    if segmentation is not None:
        return area_of(run_lengths(segmentation, size))
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _scaled(segmentation: Any, width: int, height: int) -> Any:
    """Polygons in shares of the sides, in pixels."""
    if segmentation is None:
        return None
    return [(np.reshape(p, (-1, 2)) * (width, height)).ravel().tolist() for p in segmentation]


def exif_turn(orientation: int, size: Size) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """How points (..., 2) of an unturned picture of `size` lie in the one that its EXIF orientation makes of it."""
    height, width = size
    turns: dict[int, Callable[[Any, Any], tuple[Any, Any]]] = {
        5: lambda x, y: (y, x),
        6: lambda x, y: (height - y, x),
        7: lambda x, y: (height - y, width - x),
        8: lambda x, y: (y, width - x),
    }
    return lambda points: np.stack(turns[orientation](points[..., 0], points[..., 1]), -1)


def _turned(segmentation: Any, orientation: int, size: Size) -> Any:
    if segmentation is None:
        return None
    if isinstance(segmentation, list):
        turn = exif_turn(orientation, size)
        return [turn(np.reshape(polygon, (-1, 2)).astype(float)).ravel().tolist() for polygon in segmentation]
    mask = decoded(run_lengths(segmentation, size))
    turned = {5: mask.T, 6: np.rot90(mask, -1), 7: mask[::-1, ::-1].T, 8: np.rot90(mask)}[orientation]
    return encoded(turned)


# --- run lengths


@lru_cache(1)
def _library() -> Any:
    with needs("detect"):
        from pycocotools import mask
    return mask


def run_lengths(segmentation: Any, size: Size) -> dict[str, Any]:
    """Compressed run lengths of polygons, or of run lengths in any of COCO's forms: what pycocotools works on."""
    mask = _library()
    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, *size)
    return segmentation | {"counts": segmentation["counts"].encode()}


def run_counts(text: str) -> list[int]:
    """Run lengths of COCO's compressed text: 5 bits a sign, each the difference to the one before the last.

    Raises:
        ValueError: it ends within a number.
    """
    counts: list[int] = []
    value = shift = 0
    for sign in text.encode():
        bits = sign - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("run lengths that end within a number")
    return counts


def united(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Run lengths of a mask in several parts, each as run lengths of the same size, as JSON can hold them."""
    runs = _library().merge([run_lengths(part, part["size"]) for part in parts])
    return {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode()}


def decoded(runs: dict[str, Any]) -> NDArray[np.uint8]:
    """The mask (H, W) of run lengths."""
    return _library().decode(runs)


def area_of(runs: dict[str, Any]) -> float:
    """Pixels of the mask of run lengths."""
    return float(_library().area(runs))


def encoded(mask: NDArray[Any]) -> dict[str, Any]:
    """Run lengths of a mask (H, W), as JSON can hold them."""
    runs = _library().encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(map(int, runs["size"])), "counts": runs["counts"].decode()}


# --- what readers share


def box_of(segmentation: Any, size: Size | None) -> list[float]:
    """The box x0, y0, x1, y1 around polygons or run lengths; empty where no pixel is in them."""
    if segmentation is None:
        return []
    if isinstance(segmentation, list):
        found = bounds(segmentation)
        thin = min(found[2] - found[0], found[3] - found[1]) < THIN
        return [] if thin and size and not area_of(run_lengths(segmentation, size)) else found
    x, y, width, height = map(float, _library().toBbox(run_lengths(segmentation, segmentation["size"])))
    return [x, y, x + width, y + height] if width else []


def bounds(polygons: Sequence[Sequence[float]]) -> list[float]:
    """The box x0, y0, x1, y1 around polygons, whose coordinates are x and y in turn."""
    xs, ys = ([c for polygon in polygons for c in polygon[axis::2]] for axis in (0, 1))
    return [min(xs), min(ys), max(xs), max(ys)]


class Boxes:
    """Looks at every box of a data set as it is read: what it can be used for, and what is said of it."""

    def __init__(self, origin: str, left_out: LeftOut) -> None:
        self.origin, self.left_out = origin, left_out
        self.count = self.straying = self.tiny = self.apart = self.with_mask = 0
        self.first = self.first_apart = ""

    def usable(self, box: Sequence[Any], size: Size | None, name: str) -> list[float] | None:
        """A box x0, y0, x1, y1 as numbers; None where nothing of it lies in its picture (in shares of 1 without `size`)."""
        try:
            numbers = [float(side) for side in box]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
            self.left_out.add("box that is not four numbers", name)
            return None
        self.count += 1
        x0, y0, x1, y1 = numbers
        if x1 <= x0 or y1 <= y0:
            self.left_out.add("box without area", name)
            return None
        self.tiny += bool(size) and max(map(abs, numbers)) <= 1 < min(size or (0,))
        height, width = size or (1, 1)
        cut = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
        outside = max(abs(a - b) for a, b in zip(numbers, cut, strict=True))
        reach = REACH if size else 0.01
        if outside > reach:
            self.straying += 1
            self.first = self.first or name
        if cut[2] <= cut[0] or cut[3] <= cut[1]:
            self.left_out.add("box outside its picture", name)
            return None
        if outside > reach:
            self.left_out.add("box that reaches outside its picture, cut to it", name)
        return numbers

    def belongs(self, box: Sequence[float], other: Sequence[float], name: str) -> bool:
        """Whether a box has to do with its mask; one that is not the one around it, at an IoU of a half, is named too.

        COCO itself has some of these, and they count in its measures.
        """
        across, down = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
        shared = max(across, 0) * max(down, 0)
        whole = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)) - shared
        self.with_mask += 1
        if 2 * shared >= whole or max(abs(a - b) for a, b in zip(box, other, strict=True)) <= REACH:
            return True
        self.apart += 1
        self.first_apart = self.first_apart or name
        self.left_out.add(
            "mask elsewhere than its box" if not shared else "box that is not the one around its mask, kept", name
        )
        return bool(shared)

    def check(self) -> None:
        """Raise a UserError where so many boxes look odd that they cannot be what they are taken for."""
        if self.count and self.tiny == self.count:
            raise UserError(
                f"{self.origin}: all {self.count} boxes lie within a pixel; are they in shares of the sides?"
            )
        if self.straying > max(1, STRAYING * self.count):
            raise UserError(
                f"{self.origin}: {self.straying} of {self.count} boxes reach outside their pictures (first: {self.first}); "
                "are they of another form, or of pictures of another size?"
            )
        if self.apart > max(1, STRAYING * self.with_mask):
            raise UserError(
                f"{self.origin}: {self.apart} of {self.with_mask} boxes are not those of their masks (first: "
                f"{self.first_apart}); are boxes corners, where x, y, width and height are meant, or run lengths row by row?"
            )


def data_set(
    origin: str,
    tree: Tree,
    paths: list[str],
    records: list[Record],
    classes: list[str],
    category_ids: list[int],
    words: Sequence[str],
    left_out: LeftOut,
) -> DataSet:
    """The data set of these pictures, whose splits are told by the words of each ("" for none).

    Raises:
        UserError: there are no pictures, or no objects to learn.
    """
    used = set(paths) | left_out.names()  # pictures that were left out are not without annotations
    folders = {path.rpartition("/")[0] for path in paths}
    for name in tree.files:
        if name.lower().endswith(READABLE) and name not in used and name.rpartition("/")[0] in folders:
            left_out.add("picture that no annotation tells of", name)
    whole = ObjectSource(paths, tree.pictures(paths), Records(records), classes, category_ids)
    found = in_splits(origin, whole, words, left_out, least_classes=1)
    learned = found.named.get("train", range(len(found.whole)))
    if learned and all(row.crowd for i in learned for row in found.whole.targets[i].rows):
        more = f"; left out {found.left_out[0]}" if found.left_out else ""
        kind = "training images" if "train" in found.named else "images"
        raise UserError(f"{origin}: {len(learned)} {kind} without any object{more}")
    held_out = found.named.get("val", [])
    if held_out and not any(found.whole.targets[i].rows for i in held_out):
        found.left_out.append(
            Skipped(f"all {len(held_out)} images of val", "have no object, so there is nothing to measure")
        )
    return found
