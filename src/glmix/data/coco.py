"""Boxes and masks in COCO's JSON, also as annotation tools write it."""

import ast
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

from PIL import ExifTags, Image

from glmix.data.folders import Tree
from glmix.data.naming import SPLITS, find_splits, of_other_splits, one_form, split_of, split_word, words_of
from glmix.data.objects import Boxes, Record, Row, Size, box_of, data_set, run_counts, united
from glmix.data.samples import NOT_THERE, TURNED, DataSet, LeftOut
from glmix.errors import UserError

PARTS = ("images", "annotations", "categories")
OTHER_KINDS = ("captions", "panoptic", "stuff", "person_keypoints", "image_info")  # of COCO's own files
UNREADABLE = (TypeError, ValueError, SyntaxError, AttributeError, LookupError, OverflowError)  # what odd JSON raises
NO_JSON = (ValueError, RecursionError)  # what a text raises that is none, or is nested without end
FAR = 10  # times a picture's longer side: where points of a polygon are no slip of the hand


def annotation_files(tree: Tree) -> list[str]:
    """The files of a folder or tar that hold instances: by their names, or, where none is named so, by what is in them."""
    every = tree.ending_in(".json")
    files = [n for n in every if not PurePosixPath(n).name.startswith(OTHER_KINDS)]
    telling = [
        n for n in files if PurePosixPath(n).name.startswith("instances") or n.endswith("_annotations.coco.json")
    ]
    if not telling:
        plain = [n for n in files if _is_coco(tree, n)]
        return plain or [n for n in every if PurePosixPath(n).name.startswith("person_keypoints") and _is_coco(tree, n)]
    there = find_splits([split_word(n) for n in telling])
    lacking = [word for split, words in SPLITS.items() if split not in there for word in words]
    return telling + [n for n in files if split_word(n) in lacking and _is_coco(tree, n)]


def _is_coco(tree: Tree, name: str) -> bool:
    try:
        content = json.loads(_text(tree, name))
    except NO_JSON:
        return False
    return isinstance(content, dict) and all(part in content for part in ("images", "annotations"))


def _text(tree: Tree, name: str) -> str:
    return tree.read(name).decode("utf-8-sig")


def scan_coco(origin: str, tree: Tree, files: Sequence[str]) -> DataSet:
    """The pictures and objects of COCO's JSON files, one for each split.

    Categories are numbered by the training file, in the order of their ids, and those of other files go by their names.
    Names of pictures are looked for wherever they lie, by their endings; capitals and percent signs do not count.

    Raises:
        UserError: not COCO's form, or not to be understood without doubt; names file and id.
    """
    left_out = LeftOut()
    by_word: dict[str, str] = {}
    for name in files:
        word = split_word(name)
        if word in by_word:
            raise UserError(f"{origin}: {by_word[word]} and {name} are of the same split; leave one of them there")
        by_word[word] = name
    contents = {word: _read(origin, tree, name) for word, name in by_word.items()}
    first = next((w for w in ("train", "training") if w in contents), next(iter(contents)))
    ids = {word: _categories(f"{origin}: {by_word[word]}", content) for word, content in contents.items()}
    ordered = sorted(ids[first].items())
    classes, category_ids = [name for _, name in ordered], [number for number, _ in ordered]
    finder = Finder(tree)
    boxes = Boxes(origin, left_out)
    paths: list[str] = []
    records: list[Record] = []
    words: list[str] = []
    for word, content in contents.items():
        where = f"{origin}: {by_word[word]}"
        rows = _rows(where, content, ids[word], classes, boxes, left_out, by_word[word])
        for path, record in _pictures(where, by_word[word], content, finder, rows, left_out):
            paths.append(path)
            records.append(record)
            words.append(word)
    boxes.check()
    for place in sorted({p for p in paths if paths.count(p) > 1}) if len(set(paths)) < len(paths) else []:
        raise UserError(f"{origin}: {place} stands for two images of the annotations; each needs a file of its own")
    return data_set(origin, tree, paths, records, classes, category_ids, words, left_out)


def _read(origin: str, tree: Tree, name: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(tree, name))
    except (*NO_JSON, OSError) as error:
        raise UserError(f"{origin}: {name} cannot be read as JSON ({error})") from error
    missing = [part for part in PARTS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        raise UserError(f"{origin}: {name} has no list of {', '.join(missing)}; COCO's form for instances has these")
    return content


def _categories(where: str, content: Mapping[str, Any]) -> dict[int, str]:
    """Names of the categories by their ids. Of two of one name one without any object is none, as Roboflow's first."""
    found: dict[int, str] = {}
    numbers = (_whole(each.get("category_id")) for each in content["annotations"] if isinstance(each, dict))
    used = {number for number in numbers if isinstance(number, int)}
    for category in content["categories"]:
        try:
            number, name = int(category["id"]), one_form(str(category["name"]).strip())
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: category {category} needs an id and a name") from error
        same = next((i for i, known in found.items() if known == name), number)
        if same != number and len({same, number} & used) == 1:
            if number in used:
                del found[same]
            else:
                continue
        if number in found or name in found.values():
            other = number if number in found else next(i for i, known in found.items() if known == name)
            raise UserError(f"{where}: categories {other} and {number} have the same {'id' if number in found else 'name'}"
                            f" ({name}); correct one of them")  # fmt: skip
        found[number] = name
    return found


def _rows(
    where: str,
    content: Mapping[str, Any],
    ids: Mapping[int, str],
    classes: list[str],
    boxes: Boxes,
    left_out: LeftOut,
    file: str,
) -> dict[Any, list[Row]]:
    """The objects of each image, by its id."""
    for part in ("images", "annotations"):
        for place, each in enumerate(content[part]):
            if not isinstance(each, dict) or isinstance(each.get("id"), (list, dict)):
                raise UserError(f"{where}: number {place} of {part} is {json.dumps(each)[:60]}, not one of COCO's form")
    sizes = {image.get("id"): _size(image) for image in content["images"]}
    index = {name: i for i, name in enumerate(classes)}
    measured = any(_area(annotation) for annotation in content["annotations"])  # else a 0 is no area, but none
    found: dict[Any, list[Row]] = defaultdict(list)
    for annotation in content["annotations"]:
        name = f"{file}: annotation {annotation.get('id')}"
        image = annotation.get("image_id")
        if isinstance(image, (list, dict)) or image not in sizes:
            left_out.add("of an image that is not in the file", name)
            continue
        label = ids.get(_whole(annotation.get("category_id")))
        if label is None:
            raise UserError(
                f"{where}: annotation {annotation.get('id')} has category_id {annotation.get('category_id')!r}, which is "
                "not among the categories"
            )
        if label not in index:
            raise UserError(
                f"{where}: annotation {annotation.get('id')} is of class {label!r}, which the training file does not "
                f"have; it has {', '.join(classes[:5])}{' …' if len(classes) > 5 else ''}"
            )
        try:
            segmentation, problem = segmentation_of(annotation.get("segmentation"), sizes[image])
        except UNREADABLE:
            segmentation, problem = None, "mask that cannot be read"
        if problem:
            left_out.add(problem, name)
        if problem and problem != TOO_FEW:
            continue
        box = annotation.get("bbox")
        around = box_of(segmentation, sizes[image])
        if not around and segmentation is not None:
            left_out.add(NO_PIXEL, name)
        usable = boxes.usable(around if box is None else _corners(box), sizes[image] or (10**9, 10**9), name)
        if usable is None or (box is not None and around and not boxes.belongs(usable, around, name)):
            continue
        area = _area(annotation)
        crowd = str(annotation.get("iscrowd") or 0).strip().lower() not in ("0", "0.0", "false", "")
        known = area if area or measured else None
        found[image].append(Row(index[label], usable, crowd, known, segmentation, annotation.get("id")))
    return found


def _area(annotation: Mapping[str, Any]) -> float | None:
    area = annotation.get("area")
    return float(area) if isinstance(area, (int, float)) and 0 <= area < math.inf else None


def _corners(box: Any) -> list[Any]:
    try:
        x, y, width, height = (float(side) for side in box)
    except (TypeError, ValueError):
        return []
    return [x, y, x + width, y + height]


def _whole(value: Any) -> Any:
    """A whole number of any type, as 1.0, "1" or True; what is none stays as it is."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return value


def _size(image: Mapping[str, Any]) -> Size | None:
    height, width = _whole(image.get("height")), _whole(image.get("width"))
    return (height, width) if isinstance(height, int) and isinstance(width, int) and height > 0 < width else None


TOO_FEW = "polygon of fewer than three points, so that its box alone is kept"
NO_PIXEL = "mask without a pixel, which cannot be learned or found; its box is kept"
OTHER_SIZE = "mask of another size than its image"


def segmentation_of(given: Any, size: Size | None) -> tuple[Any, str]:
    """Polygons of three points or more, or run lengths as lists or texts; and what is wrong with it, if anything.

    Run lengths come as counts, as text, and as the text of Python's bytes, those of several parts in a list; points of
    polygons one after the other or in pairs.
    """
    if isinstance(given, dict):
        counts = given.get("counts")
        if isinstance(counts, str) and counts.startswith(("b'", 'b"')):
            counts = ast.literal_eval(counts).decode()
        if not isinstance(counts, (str, list)) or not given.get("size"):
            return None, "mask without counts and size"
        shape = tuple(int(side) for side in given["size"])
        if size and shape != size:
            return None, OTHER_SIZE
        runs = counts if isinstance(counts, list) else run_counts(counts)
        if sum(runs) != shape[0] * shape[1] or min(runs, default=0) < 0:
            return None, "mask whose run lengths do not fill its image"
        return {"size": list(shape), "counts": counts}, ""
    if isinstance(given, list) and given and isinstance(given[0], dict):
        parts = [segmentation_of(part, size) for part in given]
        problem = next((problem for _, problem in parts if problem), "")
        return (None, problem) if problem else (united([part for part, _ in parts]), "")
    if isinstance(given, list) and given:
        polygons = given if isinstance(given[0], (list, tuple)) else [given]
        polygons = [[c for point in p for c in point] if p and isinstance(p[0], (list, tuple)) else p for p in polygons]
        try:
            usable = [[float(c) for c in polygon] for polygon in polygons if len(polygon) >= 6]
        except (TypeError, ValueError):
            return None, "polygon that is not numbers"
        if any(len(polygon) % 2 or not all(map(math.isfinite, polygon)) for polygon in usable):
            return None, "polygon that is not pairs of numbers"
        if any(abs(c) > FAR * max(size or (10_000,)) for polygon in usable for c in polygon):
            return None, "polygon far outside its picture"
        return usable or None, "" if usable else TOO_FEW
    return None, ""


def _pictures(
    where: str,
    file: str,
    content: Mapping[str, Any],
    finder: "Finder",
    rows: Mapping[Any, list[Row]],
    left_out: LeftOut,
) -> list[tuple[str, Record]]:
    """The picture of each image, and its objects; those that are missing are left out."""
    found: list[tuple[str, Record]] = []
    seen: dict[Any, str] = {}
    for image in content["images"]:
        number, name = image.get("id"), image.get("file_name")
        if number is None or not name:
            raise UserError(f"{where}: image {image} needs an id and a file_name")
        if number in seen:
            raise UserError(f"{where}: images {seen[number]} and {name} have the same id, {number}")
        seen[number] = name
        path = finder.find(str(name), file)
        if path is None:
            left_out.add(NOT_THERE, f"{name} (image {number})")
            continue
        size = _size(image)
        if size is None and rows.get(number):
            size = finder.size(path)
            if size is None:
                left_out.add(TURNED, path)
                continue
        kept = []
        for row in rows.get(number, []):
            if isinstance(row.segmentation, dict) and tuple(row.segmentation["size"]) != size:
                left_out.add(OTHER_SIZE, f"{file}: annotation {row.id}")
            else:
                kept.append(row)
        found.append((path, Record(size, kept)))
    if 2 * len(found) < len(content["images"]):
        missing = next(
            str(image["file_name"]) for image in content["images"] if finder.find(str(image["file_name"]), file) is None
        )
        raise UserError(f"{where}: {len(seen) - len(found)} of {len(seen)} pictures are not there (first: {missing})")
    return found


NO_PICTURES = {"masks", "mask", "segmentationclass", "segmentationobject", "segmentation", "thumbs", "thumbnails"}


class Finder:
    """Finds the files of a folder or tar by names that may be written otherwise."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for path in tree.files:
            plain = _plain(path).rpartition("/")[2]
            for name in dict.fromkeys((plain, unquote(plain))):
                self.by_name[name].append(path)
        folders = {_plain(path).rpartition("/")[0] for path in tree.files}
        self.folders = {part for folder in folders for part in folder.split("/")}
        self.splits = {split_of(folder) for folder in folders}

    def find(self, name: str, beside: str) -> str | None:
        """The file that `name` means, of the likeliest place by the split of the file `beside`.

        Raises:
            UserError: it may be either of two.
        """
        given = name.replace("\\", "/")
        for wanted in dict.fromkeys((given, unquote(given))):
            candidates = self.by_name.get(_plain(wanted).rpartition("/")[2], [])
            candidates = [path for path in candidates if not self._elsewhere(path, wanted, beside)]
            if not candidates:
                continue
            if len(candidates) == 1:  # nearly always, and there may be a hundred thousand
                return candidates[0]
            ranks = {path: self._likeness(path, wanted, beside) for path in candidates}
            best = max(ranks.values())
            likeliest = [path for path, rank in ranks.items() if rank == best]
            if len(likeliest) > 1:
                raise UserError(f"{self.tree.root}: {name} of {beside} may be {likeliest[0]} or {likeliest[1]}")
            return likeliest[0]
        return None

    def _elsewhere(self, path: str, wanted: str, beside: str) -> bool:
        """Whether the wanted path says another place: a folder that is there, or another split.

        Where it says no split the file `beside` does, if pictures lie in folders of that split.
        """
        parts, asked = _plain(path).split("/"), _plain(wanted).strip("/").split("/")
        folders = asked[:-1]
        if folders and len(parts) > 1 and parts[-2] == folders[-1]:
            return False
        told = "/".join(folders)
        if not split_of(told) and split_of(beside) in self.splits:
            told = beside
        if of_other_splits(told, "/".join(parts[:-1])):
            return True
        return bool(folders) and folders[-1] in self.folders and not set(parts) >= set(folders)

    def _likeness(self, path: str, wanted: str, beside: str) -> tuple[int, bool, bool, bool, int]:
        """How much of the wanted path is there; then no folder of masks, the same letters and split, and nearness."""
        parts, asked = _plain(path).split("/"), _plain(wanted).strip("/").split("/")
        shared = next(
            (i for i, (a, b) in enumerate(zip(parts[::-1], asked[::-1])) if a != b), min(len(parts), len(asked))
        )
        near = len(PurePosixPath(path).parent.parts)
        folders, others = PurePosixPath(path).parent.parts, PurePosixPath(beside).parent.parts
        common = next((i for i, (a, b) in enumerate(zip(folders, others)) if a != b), min(len(folders), len(others)))
        masks = any(NO_PICTURES & set(words_of(folder)) for folder in folders)
        return shared, not masks, path.endswith(wanted), split_word(path) == split_word(beside), common * 100 - near

    def size(self, path: str) -> Size | None:
        """Of a picture whose annotations do not tell it: its own, unless it is turned by EXIF."""
        try:
            with Image.open(self.tree.opened(path)) as picture:
                turned = picture.getexif().get(ExifTags.Base.Orientation, 1) > 1
                return None if turned else (picture.height, picture.width)
        except OSError:  # which is said when it is read
            return 1, 1


def _plain(path: str) -> str:
    return one_form(path).lower()
