"""Writing files so that a cut leaves the old one or the new one, and never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def plain_name(name: str, longest: int) -> str:
    """A file's name for a new file: text, of `longest` bytes at most; what is no text in it is replaced by a sign."""
    text = os.fsencode(name).decode(errors="replace")
    return os.fsdecode(text.encode()[:longest].decode(errors="ignore").encode())


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
