"""A list of image paths and their labels: CSV, TSV, or text."""

import csv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import IO

from glmix.data.folders import FolderPictures
from glmix.data.images import READABLE
from glmix.data.naming import IMAGE_COLUMNS, LABEL_COLUMNS, number_labels, one_form, pick_column, split_word
from glmix.data.samples import DataSet, LeftOut, Source, by_words
from glmix.errors import UserError

ENDINGS = (".csv", ".tsv", ".txt")
SEPARATORS = ",;\t|"
PATH_COLUMNS = (
    "path",
    "file",
    *IMAGE_COLUMNS,
    "filename",
    "filepath",
    "imagepath",
    "imgpath",
    "imagename",
    "imagefile",
)
COLUMNS = {
    "path or file or image or filename": PATH_COLUMNS,
    "label or class": LABEL_COLUMNS,
    "split": ("split",),
}
Rows = list[tuple[int, list[str]]]


def scan_table(source: str) -> DataSet:
    """The images that a table lists.

    Cells are separated by commas, semicolons, tabs or bars; in a text of two columns also by spaces. A header names the
    columns (`COLUMNS`); without one there are two, path and label. Paths start at the table's folder and may be written
    with backslashes. An image that is not there is found when it is read, as a damaged one is.

    Raises:
        UserError: it cannot be read, a column is missing, a row is not like the others, or none of the images is there.
    """
    folder = Path(source).parent
    separator, rows = _read(source)
    head = rows.pop(0)[1] if rows else []
    columns = [pick_column(head, names) for names in COLUMNS.values()]
    if not any(columns) and len(head) == 2 and _is_path(folder, head[0]):
        rows.insert(0, (1, head))
        head, columns = ["path", "label"], ["path", "label", None]
    for column, names in zip(columns[:2], COLUMNS, strict=False):
        if column is None:
            raise UserError(f"{source}: no column {names}; found {', '.join(head) or 'none'}; name it in the first row")
    places = [head.index(column) for column in columns if column]
    expected = separator.join(head) + (" with train or val as the split" if columns[2] else "")
    chosen = []
    for number, row in rows:
        path, label, *word = [row[i] for i in places] if len(row) == len(head) else ("", "")
        word = [split_word(text) for text in word]
        if not (path and label and all(word)):
            raise UserError(f"{source}: row {number} is {separator.join(row)!r}, not {expected}; correct it")
        chosen.append((_with_slashes(folder, path), label, *word, ""))
    paths = [row[0] for row in chosen]
    if paths and not any((folder / path).exists() for path in paths):
        raise UserError(
            f"{source}: none of the {len(paths)} images is there (first: {folder / paths[0]}); "
            f"paths start at {folder.resolve()}, where the list lies"
        )
    targets, classes = number_labels([row[1] for row in chosen], None, source)
    whole, left_out = (
        Source([one_form(path) for path in paths], FolderPictures(folder, paths), targets, classes),
        LeftOut(),
    )
    return by_words(source, whole, [row[2] for row in chosen], left_out)


def listed_paths(source: str) -> list[str]:
    """The paths in a table, whatever else it has: of the column that is called so, or the first cells where none is.

    Raises:
        UserError: it cannot be read, or none of its columns has paths.
    """
    folder = Path(source).parent
    _, rows = _read(source)
    head = rows[0][1] if rows else [""]
    column = pick_column(head, PATH_COLUMNS)
    if column is None and not _is_path(folder, head[0]):
        raise UserError(f"{source}: no column path or file or image or filename; found {', '.join(head)}")
    place = head.index(column) if column else 0
    cells = [row[place] for _, row in (rows[1:] if column else rows) if len(row) > place and row[place]]
    return [_with_slashes(folder, cell) for cell in cells]


def _read(source: str) -> tuple[str, Rows]:
    """The separator that fits best, and the rows that are not empty with the numbers of their lines."""
    separators = SEPARATORS + " " * source.lower().endswith(".txt")
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
            tries = {}
            for separator in separators:
                file.seek(0)
                tries[separator] = list(islice(_rows(file, separator), 50))
            separator = max(separators, key=lambda sign: _fit(tries[sign], Path(source).parent))
            file.seek(0)
            return separator, list(_rows(file, separator))
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a CSV in UTF-8 ({error}); save it as one") from error


def _rows(file: IO[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    if separator == " ":  # the last one in a line: paths may have others
        lines = ((number, line.rsplit(None, 1)) for number, line in enumerate(file, 1))
        return ((number, row) for number, row in lines if row)
    reader = csv.reader(file, delimiter=separator)
    return ((reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row))


def _fit(rows: Rows, folder: Path) -> tuple[bool, bool, int]:
    """How well rows are cut: whether the first names the columns, whether it is path and label, how many are like it."""
    head = rows[0][1] if rows else []
    named = all(pick_column(head, names) for names in (PATH_COLUMNS, LABEL_COLUMNS))
    alike = sum(len(row) == len(head) for _, row in rows) if len(head) > 1 else 0
    return named, len(head) == 2 and _is_path(folder, head[0]), alike


def _is_path(folder: Path, cell: str) -> bool:
    """Whether a cell of the first row is the path of an image, and not a column's name."""
    return cell.lower().endswith(READABLE) or (folder / _with_slashes(folder, cell)).is_file()


def _with_slashes(folder: Path, path: str) -> str:
    """A path as this system writes it; lists that were made on Windows have backslashes."""
    if "\\" not in path or (folder / path).exists():
        return path
    return PureWindowsPath(path).as_posix()
