"""Writing files so that a cut leaves the old one or the new one, and never half of one."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from glmix.errors import UserError

# What some system takes in no file name: Windows, and with it most drives that travel.
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.I)


def plain_name(name: str, longest: int) -> str:
    """A file's name for a new file that every system takes: text, of `longest` bytes at most.

    What is no text in it, and what Windows forbids, is replaced.
    """
    text = FORBIDDEN.sub("_", readable(name, "replace"))
    text = RESERVED.sub(r"\1_", text) if RESERVED.match(text) else text
    text = text.encode()[:longest].decode(errors="ignore")
    return os.fsdecode(re.sub(r"[ .]$", "_", text).encode())  # the same bytes where names of files are ASCII alone


def readable(name: str, errors: str = "backslashreplace") -> str:
    """The name of a file as text that every file can hold; bytes that are none become escapes."""
    return os.fsencode(name).decode(errors=errors)


def check_folder(option: str, path: str | Path) -> None:
    """Raise a UserError where a folder is to be written, and a file is there."""
    if path and Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"{path}: a file; {option} is a folder")


@contextmanager
def written_whole(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:
    """A file to write to, as by `open`: it is beside `path` until all is written and synced, then takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
