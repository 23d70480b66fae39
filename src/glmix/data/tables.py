"""A CSV of image paths and their labels."""

import csv
from pathlib import Path

from glmix.data.images import ImageSet
from glmix.data.samples import number_labels, pick_column, split_word
from glmix.errors import UserError

COLUMNS = {"path": ("path", "file", "image", "filename"), "label": ("label", "class"), "split": ("split",)}


def scan_csv(source: str) -> tuple[ImageSet, list[str]]:
    """The images that a CSV lists, and the split word of each.

    A header names the columns (`COLUMNS`); without one there are two, path and label. Paths start at the CSV's folder.
    Labels are class names, also where they look like numbers. An image that is not there is found when it is read, as a
    damaged one is.

    Raises:
        UserError: it cannot be read, a column is missing, or a row is not like the others.
    """
    try:
        with open(source, newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source}: not a CSV in UTF-8 ({error}); save it as one") from error
    head = rows.pop(0)[1] if rows else []
    columns = [pick_column(head, names) for names in COLUMNS.values()]
    if not any(columns) and len(head) == 2:
        rows.insert(0, (1, head))
        head, columns = ["path", "label"], ["path", "label", None]
    for column, names in zip(columns[:2], COLUMNS.values(), strict=False):
        if column is None:
            raise UserError(
                f"{source}: no column {' or '.join(names)}; found {', '.join(head) or 'none'}; name it in the first row"
            )
    places = [head.index(column) for column in columns if column]
    expected = ",".join(head) + (" with train or val as the split" if columns[2] else "")
    chosen = []
    for number, row in rows:
        path, label, *word = [row[i] for i in places] if len(row) == len(head) else ("", "")
        word = [split_word(text) for text in word]
        if not (path and label and all(word)):
            raise UserError(f"{source}: row {number} is {','.join(row)!r}, not {expected}; correct it")
        chosen.append((path, label, *word, ""))
    labels, classes = number_labels([row[1] for row in chosen], None, source)
    return ImageSet(Path(source).parent, [row[0] for row in chosen], labels, classes), [row[2] for row in chosen]
