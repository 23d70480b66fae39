"""What is said on a terminal, and never at the cost of the work: a reader that went away ends no training."""

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO


def say(text: str, to: TextIO | None = None) -> None:
    """A line on standard error (or `to`); dropped from the moment on at which nobody reads it any more."""
    stream = to or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        mute(stream)


def progress(done: int, count: int, what: str = "") -> None:
    """How far a long work is, on one line of a terminal that is written over; nothing where there is no terminal."""
    if sys.stderr.isatty():
        with suppress(BrokenPipeError):
            print(f"\r{done}/{count} {what}", end="" if done < count else "\n", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows as a table of text: the first `left` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def as_json(value: Any) -> str:
    """As JSON has it, which knows no number that is none: NaN becomes null."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(each) for each in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value))


def mute(stream: TextIO) -> None:
    """Let what is still written to a stream that nobody reads go nowhere, also what Python flushes at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def lenient() -> None:
    """Let any file name be printed: what a terminal cannot show becomes an escape; and all where nobody listens at all."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the program began, as by `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (open as long as the program runs)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # streams that a test put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
