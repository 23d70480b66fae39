"""Rows to a file, as they come: CSV, JSON lines or parquet, whole or not there."""

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from glmix.errors import UserError, needs
from glmix.files import written_whole

ENDINGS = (".csv", ".jsonl", ".parquet")
GROUP = 1000  # rows of parquet at a time

Columns = Mapping[str, Any]  # names and types: str, int, float, or a number: float vectors of that length


def check_ending(path: Path, endings: Iterable[str] = ENDINGS) -> None:
    """Raise a UserError before any work where a file's ending is of no format that is written, or a library is missing."""
    endings = tuple(endings)
    if path.suffix.lower() not in endings:
        raise UserError(f"--out {path}: its ending says the format; there are {', '.join(endings)}")
    if path.is_dir():
        raise UserError(f"--out {path}: a folder; name a file")
    if path.suffix.lower() == ".parquet":
        with needs("tables"):
            import pyarrow  # noqa: F401


def write_table(path: Path, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, whose cells are empty where they lack a column, in the format of the file's ending."""
    {".csv": write_csv, ".jsonl": write_lines, ".parquet": write_parquet}[path.suffix.lower()](path, columns, rows)


def write_csv(path: Path, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> None:
    """CSV in UTF-8; None is an empty cell."""
    with written_whole(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON object a row, with all columns."""
    with written_whole(path, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row.get(name) for name in columns}, ensure_ascii=False) + "\n")


def write_parquet(path: Path, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> None:
    """Parquet: texts, int64, float64, and lists of float32 of one length."""
    import pyarrow
    import pyarrow.parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    types = {
        n: pyarrow.list_(pyarrow.float32(), kind) if isinstance(kind, int) else kinds[kind]
        for n, kind in columns.items()
    }
    schema = pyarrow.schema(list(types.items()))
    rows = iter(rows)
    with written_whole(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, GROUP)):
            arrays = [pyarrow.array([row.get(name) for row in group], kind) for name, kind in types.items()]
            writer.write_table(pyarrow.table(arrays, schema=schema))
