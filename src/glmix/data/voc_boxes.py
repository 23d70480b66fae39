"""Boxes in PASCAL VOC's XML, also as annotation tools write it."""

from pathlib import PurePosixPath
from xml.etree import ElementTree

from glmix.data.coco import Finder
from glmix.data.folders import Tree
from glmix.data.images import READABLE
from glmix.data.naming import SPLIT_WORDS, SPLITS, named_in_list, one_form, plain_stem, split_word
from glmix.data.objects import Boxes, Record, Row, Size, data_set
from glmix.data.samples import NOT_THERE, TURNED, DataSet, LeftOut
from glmix.errors import UserError


def scan_voc(origin: str, tree: Tree, files: list[str]) -> DataSet:
    """The pictures and objects of VOC's XML files, in the splits of ImageSets/Main, or else of their folders.

    VOC counts pixels from 1, and the last one belongs to the box. Where any box of the data begins at 0, its tool
    counted from 0, and coordinates are taken as they are. What is `difficult` is neither learned nor counted.

    Raises:
        UserError: a file that is no XML of VOC's form; names it.
    """
    left_out = LeftOut()
    splits = _splits(origin, tree, files, left_out)
    finder, boxes = Finder(tree), Boxes(origin, left_out)
    found: list[tuple[str, str, ElementTree.Element, Size]] = []
    for name in files:
        root = _parsed(origin, tree, name)
        if root is None:
            continue
        path = _picture(root, name, finder)
        if path is None:
            left_out.add(NOT_THERE, f"{root.findtext('filename') or '?'} ({name})")
            continue
        size = _size(root) or finder.size(path)
        if size is None:
            left_out.add(TURNED, path)
            continue
        found.append((name, path, root, size))
    if not found:
        raise UserError(f"{origin}: none of {len(files)} XML files has its picture there (first: {files[0]})")
    objects = [(name, root.findall("object")) for name, _, root, _ in found]
    classes = sorted({_name(origin, file, each) for file, parts in objects for each in parts})
    index = {name: i for i, name in enumerate(classes)}
    first = 1 if all(side >= 1 for file, parts in objects for each in parts for side in _sides(each)[:2]) else 0
    records: list[Record] = []
    for name, _, root, size in found:
        rows = []
        for number, each in enumerate(root.findall("object"), 1):
            where = f"{name}: object {number}"
            sides = _sides(each)
            corners = [sides[0] - first, sides[1] - first, *sides[2:]] if len(sides) == 4 else []
            usable = boxes.usable(corners, size, where)
            if usable is not None:
                crowd = (each.findtext("difficult") or "0").strip() not in ("0", "false", "False", "")
                rows.append(Row(index[_name(origin, name, each)], usable, crowd, id=number))
        records.append(Record(size, rows))
    boxes.check()
    paths = [path for _, path, _, _ in found]
    words = [
        splits.get(plain_stem(n), "") if splits else split_word(str(PurePosixPath(n).parent)) for n, _, _, _ in found
    ]
    return data_set(origin, tree, paths, records, classes, list(range(1, len(classes) + 1)), words, left_out)


def is_voc(tree: Tree, name: str) -> bool:
    """Whether an XML file is one of VOC's."""
    return b"<annotation" in tree.read(name)[:400]


def _parsed(origin: str, tree: Tree, name: str) -> ElementTree.Element | None:
    try:
        root = ElementTree.fromstring(tree.read(name))
    except ElementTree.ParseError as error:
        raise UserError(f"{origin}: {name} cannot be read as XML ({error})") from error
    return root if root.tag == "annotation" else None


def _picture(root: ElementTree.Element, name: str, finder: Finder) -> str | None:
    """The picture of the same name as the XML file; else the one that it names."""
    stem = PurePosixPath(name).stem
    told = (root.findtext("filename") or "").strip()
    endings = dict.fromkeys([PurePosixPath(told).suffix, *(ending for ending in (".jpg", ".png", ".jpeg", *READABLE))])
    same = (finder.find(stem + ending, name) for ending in endings if ending)
    return next((path for path in same if path), None) or (finder.find(told, name) if told else None)


def _name(origin: str, file: str, each: ElementTree.Element) -> str:
    name = one_form((each.findtext("name") or "").strip())
    if not name:
        raise UserError(f"{origin}: {file} has an object without a name")
    return name


def _sides(each: ElementTree.Element) -> list[float]:
    """xmin, ymin, xmax, ymax, by their names and not by their order; none where one of them is no number."""
    try:
        return [float(each.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        return []


def _size(root: ElementTree.Element) -> Size | None:
    try:
        height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 < width else None


def _splits(origin: str, tree: Tree, files: list[str], left_out: LeftOut) -> dict[str, str]:
    """The split's word of each picture, by the lists in ImageSets/Main; keys are as `plain_stem` has them.

    Raises:
        UserError: a picture is in two lists, or all that they name is not there.
    """
    stems = {plain_stem(name) for name in files}
    found: dict[str, str] = {}
    unknown = ""
    for name in tree.ending_in(".txt"):
        path, word = PurePosixPath(name), PurePosixPath(name).stem.lower()
        if path.parent.name != "Main" or word not in SPLIT_WORDS:
            continue
        for line in tree.read(name).decode("utf-8-sig", errors="replace").splitlines():
            stem = named_in_list(line, stems) if line.strip() else ""
            if line.strip() and not stem:
                left_out.add("in a list of a split, but not there", f"{line.strip()} ({name})")
                unknown = unknown or f"{line.strip()} of {name}"
            elif stem and (found.setdefault(stem, word) in SPLITS["train"]) != (word in SPLITS["train"]):
                raise UserError(
                    f"{origin}: {stem} is in the lists of {found[stem]} and {word}; leave it in one of them"
                )
    if unknown and not found:
        raise UserError(f"{origin}: nothing that the lists of splits name is there (first: {unknown})")
    return found
