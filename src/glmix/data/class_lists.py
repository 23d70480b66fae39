"""Lists of classes that lie beside masks: names, the numbers they have in masks, and their colours."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from glmix.data.folders import Tree
from glmix.data.naming import one_form, pick_column
from glmix.errors import UserError

Colour = tuple[int, int, int]

IGNORED = 255  # in maps, and in masks where no class has that number: nothing is learned or measured there
VOID = {"void", "unlabelled", "unlabeled", "ignore", "ignored"}  # names, in small letters, that mean the same
LISTS = (
    *("class_dict.csv", "labelmap.txt", "_classes.csv", "classes.csv", "classes.txt", "class_names.txt", "labels.txt"),
    *("codes.txt", "label_colors.txt", "objectinfo150.txt", "labels.json", "classes.json"),
)
COLOUR_COLUMNS = (("r", "red"), ("g", "green"), ("b", "blue"))
VALUE_COLUMNS = (
    *("pixelvalue", "value", "index", "idx", "trainid", "id", "classid", "labelid", "categoryid", "code", "number"),
    *("gray", "grey", "label"),
)
NAME_COLUMNS = ("name", "class", "classname", "labelname", "category", "label")


class Entry(NamedTuple):
    """A class as a list has it: its name, its number in masks (None: its place in the list), and its colour."""

    name: str
    value: int | None = None
    colour: Colour | None = None

    @property
    def void(self) -> bool:
        return self.name.lower().strip("_") in VOID


class ClassList(NamedTuple):
    """A list of classes, and the file that it is from."""

    file: str
    entries: list[Entry]

    @property
    def classes(self) -> list[str]:
        """Names of all that are to be learned, by their numbers where they have any."""
        ordered = sorted(self.entries, key=lambda entry: entry.value or 0)
        return list(dict.fromkeys(entry.name for entry in ordered if not entry.void))

    def values(self) -> dict[int, int]:
        """The class index, or `IGNORED`, of each number in masks."""
        index = {name: i for i, name in enumerate(self.classes)}
        numbered = ((i if entry.value is None else entry.value, entry) for i, entry in enumerate(self.entries))
        return {IGNORED: IGNORED} | {i: IGNORED if entry.void else index[entry.name] for i, entry in numbered}

    def colours(self) -> dict[Colour, int]:
        """The class index, or `IGNORED`, of each colour; empty where a class has none."""
        index = {name: i for i, name in enumerate(self.classes)}
        found = {e.colour: IGNORED if e.void else index[e.name] for e in self.entries if e.colour is not None}
        return found if len(found) == len(self.entries) else {}

    @property
    def numbered(self) -> bool:
        return all(entry.value is not None for entry in self.entries)


def class_list(origin: str, tree: Tree) -> ClassList | None:
    """The list of classes in a folder or tar; None where there is none.

    Raises:
        UserError: there are several that differ, or one that cannot be read without doubt.
    """
    found = [
        ClassList(name, _entries(origin, name, _text(origin, tree, name)))
        for wanted in LISTS
        for name in tree.files
        if PurePosixPath(name).name.lower() == wanted
    ]
    for other in found[1:]:
        if other.classes != found[0].classes or (other.numbered and other.values() != found[0].values()):
            raise UserError(f"{origin}: {found[0].file} and {other.file} list other classes; leave one of them there")
        colours, theirs = found[0].colours(), other.colours()
        if colours and theirs and colours != theirs:
            raise UserError(f"{origin}: {found[0].file} and {other.file} give other colours; leave one of them there")
    return next((listed for listed in found if listed.colours()), found[0] if found else None)


def _text(origin: str, tree: Tree, name: str) -> str:
    try:
        opened = tree.opened(name)
        return (opened.read_bytes() if isinstance(opened, Path) else opened.read()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{origin}: {name} cannot be read as text ({error})") from error


def _entries(origin: str, file: str, text: str) -> list[Entry]:
    """What a list says.

    Raises:
        UserError: it says nothing, or two things of one number, colour or name.
    """
    where = f"{origin}: {file}"
    base = PurePosixPath(file).name.lower()
    if base.endswith(".json"):
        found = _of_json(where, text)
    elif base.endswith(".csv") or base == "objectinfo150.txt":
        found = _of_table(where, text)
    else:
        found = _of_lines(line.strip() for line in text.splitlines())
    found = [entry._replace(name=one_form(entry.name.strip())) for entry in found]
    if not any(not entry.void and entry.name for entry in found):
        raise UserError(f"{where} names no class")
    for part in ("value", "colour"):
        seen: dict[Any, str] = {}
        for entry in found:
            given = getattr(entry, part)
            if given is not None and seen.setdefault(given, entry.name) != entry.name:
                raise UserError(f"{where}: {seen[given]} and {entry.name} have the same {part}, {given}; correct one")
    twice = next((entry.name for entry in found if found.count(entry) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: {twice} is there twice; correct one")
    if len({entry.value is None for entry in found}) > 1:
        raise UserError(f"{where}: some classes have a number, and some have none")
    beyond = next((e.name for e in found if e.colour is not None and not all(0 <= c <= 255 for c in e.colour)), None)
    if beyond:
        raise UserError(f"{where}: the colour of {beyond} is not of three numbers from 0 to 255")
    if len({entry.name for entry in found if not entry.void}) > IGNORED:
        raise UserError(f"{where}: {len(found)} classes; {IGNORED} can be told apart")
    return found


def _of_lines(given: Iterable[str]) -> list[Entry]:
    """A name a line, with its number before it, its colour before or after it, or both; also as CVAT writes them."""
    lines = [line for line in given if line and not line.startswith("#")]
    cvat = [re.fullmatch(r"([^:]+):(?:(\d+),(\d+),(\d+))?:[^:]*:[^:]*", line) for line in lines]
    before = [re.fullmatch(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\D.*)", line) for line in lines]
    after = [re.fullmatch(r"(.*?)[\s,;:]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)", line) for line in lines]
    if all(cvat):
        return [Entry(m[1], None, _colour(m.groups()[1:]) if m[2] else None) for m in cvat if m]
    if all(before):
        return [Entry(m[4], None, _colour(m.groups()[:3])) for m in before if m]
    colours: list[Colour | None] = [None] * len(lines)
    if all(after):
        colours = [_colour(m.groups()[1:]) for m in after if m]
        lines = [m[1] for m in after if m]
    numbered = [re.fullmatch(r"(\d+)\s*[\s:,;]\s*(.+)", line) for line in lines]
    if all(numbered):
        return [Entry(m[2], int(m[1]), c) for m, c in zip(numbered, colours, strict=True) if m]
    if lines and lines[0] == "__ignore__":  # as labelme has it: not counted
        lines, colours = lines[1:], colours[1:]
    return [Entry(line, None, colour) for line, colour in zip(lines, colours, strict=True)]


def _colour(parts: Iterable[Any]) -> Colour:
    red, green, blue = (int(part) for part in parts)
    return red, green, blue


def _of_table(where: str, text: str) -> list[Entry]:
    """Rows with a name, and a number or a colour or both."""
    header = text.partition("\n")[0]
    separator = next((sign for sign in "\t;," if sign in header), ",")
    rows = list(csv.DictReader(text.splitlines(), delimiter=separator, skipinitialspace=True))
    columns = list(rows[0]) if rows else []
    name = pick_column(columns, NAME_COLUMNS)
    value = pick_column([column for column in columns if column != name], VALUE_COLUMNS)
    colour = [pick_column(columns, names) for names in COLOUR_COLUMNS]
    if name is None or (len(columns) > 3 and value is None and None in colour):
        raise UserError(f"{where} needs a first line that names its columns, such as name,r,g,b")
    other = next((c for c in columns if c not in (name, *colour) and all(_whole(row[c]) for row in rows)), None)
    if value is None and None in colour and other is not None:
        raise UserError(f"{where}: {other} holds numbers; if they are those in masks, call that column value")
    try:
        return [
            Entry(
                row[name],
                int(row[value]) if value else None,
                _colour(row[c] for c in colour if c) if all(colour) else None,
            )
            for row in rows
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a number or colour that is none ({error})") from error


def _of_json(where: str, text: str) -> list[Entry]:
    """Names in a list, alone or with number and colour; or names by number, or numbers by name."""
    try:
        content = json.loads(text)
        while isinstance(content, dict):
            inside = next((content[k] for k in ("labels", "classes", "categories", "items") if k in content), None)
            if inside is None:
                return [_of_pair(key, value) for key, value in content.items()]
            content = inside
        return [_of_item(item) for item in content]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{where} is no list of names, nor of names by number ({error!r})") from error


def _whole(text: Any) -> bool:
    return isinstance(text, str) and text.strip().isdigit()


def _of_pair(key: str, value: Any) -> Entry:
    if isinstance(value, str):
        return Entry(value, int(key))
    return Entry(key, None, _colour(value)) if isinstance(value, list) else Entry(key, int(value))


def _of_item(item: Any) -> Entry:
    if isinstance(item, str):
        return Entry(item)
    name = next(item[key] for key in ("name", "title", "label", "readable") if isinstance(item.get(key), str))
    column = pick_column([key for key in item if item[key] != name], VALUE_COLUMNS)
    numbers = [key for key, each in item.items() if isinstance(each, int) and not isinstance(each, bool)]
    if column is None and numbers:
        raise ValueError(f"{numbers[0]} of {name} is a number; if it is that in masks, call it value")
    value = None if column is None else int(item[column])
    colour = item.get("color", item.get("colour"))
    if isinstance(colour, str):
        colour = bytes.fromhex(colour.removeprefix("#"))
    return Entry(name, value, None if colour is None else _colour(colour))
