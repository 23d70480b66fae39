"""Boxes and polygons in YOLO's form: a data.yaml, pictures, and a text file beside each of them."""

import posixpath
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from glmix.data.folders import Tree
from glmix.data.images import READABLE
from glmix.data.naming import one_form
from glmix.data.objects import Boxes, Record, Row, bounds, data_set
from glmix.data.samples import DataSet, LeftOut
from glmix.errors import UserError

NO_LABELS = {"classes", "labels", "obj", "readme", "notes", "train", "val", "valid", "test"}  # text files beside labels
SPLITS = {"train": "train", "val": "val", "valid": "val", "test": "test"}  # keys of data.yaml


def description_file(tree: Tree) -> str | None:
    """The data.yaml of a folder or tar: the first YAML file with `names` and a split."""
    for name in sorted(tree.ending_in(".yaml", ".yml"), key=lambda n: (n.count("/"), n)):
        try:
            content = yaml.safe_load(_text(tree, name))
        except (yaml.YAMLError, UserError):
            continue
        if isinstance(content, dict) and ("names" in content or "nc" in content) and set(SPLITS) & set(content):
            return name
    return None


def read_description(where: str, text: bytes) -> dict[str, Any]:
    """What a data.yaml says.

    Raises:
        UserError: it cannot be read, or says something else.
    """
    try:
        content = yaml.safe_load(text.decode("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: cannot be read as YAML ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: names neither classes nor splits, as a data.yaml does")
    return content


def scan_yolo(origin: str, tree: Tree, file: str, content: dict[str, Any] | None = None) -> DataSet:
    """The pictures and objects that a data.yaml names. A picture without a text file has no objects.

    A picture of train that val names too, as in samples for a first try, is for training alone; where nothing is left
    of val, a tenth is held out as in data without splits. The file's `content` may be given: it need not lie in `tree`.

    A line is a class's number and four shares (a box by its middle and size) or six and more (a polygon).

    Raises:
        UserError: a line that is neither, or of a class that is not in the list; names file and line.
    """
    content = content or read_description(f"{origin}: {file}", tree.read(file))
    classes, ids = _classes(f"{origin}: {file}", content)
    points = _points(f"{origin}: {file}", content)
    written = {one_form(name).lower(): name for name in tree.ending_in(".txt")}
    spoken: set[str] = set()
    left_out = LeftOut()
    boxes = Boxes(origin, left_out)
    paths: list[str] = []
    records: list[Record] = []
    words: list[str] = []
    seen: dict[str, str] = {}  # the split of each
    for key, word in SPLITS.items():
        for path in _pictures(origin, tree, file, content, key):
            if word == "test" or seen.get(path) == word:
                continue
            if path in seen:
                left_out.add("pictures of val, which train has too", path)
                continue
            seen[path] = word
            labels = written.get(one_form(_labels_of(path)).lower())
            rows = list(_rows(origin, tree, labels, ids, boxes, points)) if labels else []
            spoken.update([labels] if labels else [])
            paths.append(path)
            records.append(Record(None, rows))
            words.append(word)
    folders = {labels.rpartition("/")[0] for labels in spoken} | {_labels_of(p).rpartition("/")[0] for p in paths}
    tested = {one_form(_labels_of(path)).lower() for path in _pictures(origin, tree, file, content, "test")}
    for plain, name in written.items():
        beside = name.rpartition("/")[0] in folders and PurePosixPath(name).stem.lower() not in NO_LABELS
        if beside and name not in spoken and plain not in tested:
            left_out.add("labels without a picture", name)
    boxes.check()
    return data_set(origin, tree, paths, records, classes, list(ids), words, left_out)


def _text(tree: Tree, name: str) -> str:
    try:
        return tree.read(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} cannot be read as text ({error})") from error


def _classes(where: str, content: dict[str, Any]) -> tuple[list[str], dict[int, int]]:
    """Names of the classes, and the index of each of the numbers that stand for them."""
    names = content.get("names", list(range(int(content.get("nc", 0)))))
    numbered = dict(enumerate(names)) if isinstance(names, list) else {int(k): v for k, v in dict(names).items()}
    if not numbered:
        raise UserError(f"{where}: names no classes")
    numbers = sorted(numbered)
    told = [one_form(str(numbered[n])) for n in numbers]
    twice = next((name for name in told if told.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two classes are called {twice}; correct one of them")
    if isinstance(content.get("nc"), int) and content["nc"] != len(numbers):
        raise UserError(f"{where}: nc is {content['nc']}, and {len(numbers)} classes have names; correct one of them")
    return told, {number: i for i, number in enumerate(numbers)}


def _pictures(origin: str, tree: Tree, file: str, content: dict[str, Any], key: str) -> Iterator[str]:
    """The pictures of a split: of folders, or of text files that list them; paths are by `path`, or beside the YAML."""
    named = content.get(key) or []
    for each in [named] if isinstance(named, str) else named:
        place = _place(tree, file, str(content.get("path") or ""), str(each))
        if place is None:
            if key == "test":
                return
            raise UserError(f"{origin}: {file} names {key}: {each}, which is not there")
        if place.lower().endswith(".txt"):
            for line in filter(None, map(str.strip, _text(tree, place).splitlines())):
                found = _place(tree, place, str(content.get("path") or ""), line)
                if found is None:
                    raise UserError(f"{origin}: {place} names {line}, which is not there")
                yield found
        else:
            below = "" if place == "." else f"{place}/"
            yield from (n for n in tree.files if n.startswith(below) and n.lower().endswith(READABLE))


def _place(tree: Tree, file: str, root: str, name: str) -> str | None:
    """A path in the tree by a name as YOLO's files have it: such names often tell where the data lay once."""
    beside = str(PurePosixPath(file).parent)
    absolute = Path(root, name)
    tries = [posixpath.join(beside, root, name), posixpath.join(beside, name)]
    if absolute.is_absolute() and absolute.is_relative_to(tree.root.resolve()):
        tries.insert(0, str(absolute.relative_to(tree.root.resolve())))
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("..", ".", "/")]
    tries += ["/".join(parts[i:]) for i in range(len(parts))]  # what is left of a path of another machine
    for each in tries:
        normal = posixpath.normpath(each)
        if normal == "." or normal in tree.folders_and_files:
            return normal
    return None


def _labels_of(path: str) -> str:
    """Where the objects of a picture are written: in labels/ for the last images/ of its path, or beside it."""
    before, folder, after = f"/{path}".rpartition("/images/")
    where = f"{before}/labels/{after}" if folder else f"/{path}"
    return str(PurePosixPath(where).with_suffix(".txt"))[1:]


def _points(where: str, content: dict[str, Any]) -> int:
    """How many numbers of key points follow the box in every line; 0 for none."""
    shape = content.get("kpt_shape")
    try:
        return int(shape[0]) * int(shape[1]) if shape else 0
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"{where}: kpt_shape is {shape}, not [points, 2 or 3]") from error


def _rows(origin: str, tree: Tree, file: str, ids: dict[int, int], boxes: Boxes, points: int) -> Iterator[Row]:
    for number, line in enumerate(_text(tree, file).splitlines(), 1):
        where, words = f"{file}: line {number}", line.split()
        if not words:
            continue
        try:
            kind, shares = float(words[0]), [float(word) for word in words[1:]]
        except ValueError as error:
            raise UserError(f"{origin}: {where} is not numbers") from error
        if kind not in ids:
            raise UserError(f"{origin}: {where} has class {words[0]}; data.yaml lists {len(ids)}, from {min(ids)}")
        if points and len(shares) == 4 + points:  # of key points the boxes alone are read
            shares = shares[:4]
        elif points:
            raise UserError(
                f"{origin}: {where} has {len(shares)} numbers behind the class; by kpt_shape it has {4 + points}"
            )
        if len(shares) == 4:
            x, y, width, height = shares
            corners, polygons = [x - width / 2, y - height / 2, x + width / 2, y + height / 2], None
        elif len(shares) >= 6 and len(shares) % 2 == 0:
            corners, polygons = bounds([shares]), [shares]
        else:
            raise UserError(
                f"{origin}: {where} has {len(shares)} numbers behind the class; a box has 4, a polygon 6 or more, in pairs"
            )
        if max(map(abs, shares)) > 2:
            raise UserError(f"{origin}: {where} is not in shares of the picture's sides, from 0 to 1")
        usable = boxes.usable(corners, None, where)
        if usable is not None:
            yield Row(ids[int(kind)], usable, False, None, polygons, number)
