"""Work on numbered things that may be cut at any moment: what is done is kept beside the file that it will become.

Each process of each attempt appends lines to a file of its own, `NUMBER <tab> JSON`. A line that a kill left without its
end counts for nothing. The folder goes when the whole is written.
"""

import heapq
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from glmix.errors import UserError
from glmix.files import written_whole


class Journal:
    """What is done of `count` numbered things on their way to the file `out`.

    Args:
        out: the file that is to be.
        settings: all that decides what is done, as plain data; an attempt with others is refused.
        count: of the things.

    Raises:
        UserError: beside `out` lies what another command began.
    """

    def __init__(self, out: Path, settings: dict[str, Any], count: int) -> None:
        self.folder = out.with_name(f".{out.name}.parts")
        self.count = count
        path = self.folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{out}: another command was begun for it (other images, weights or options: {path}); "
                f"repeat that one, choose another --out, or remove {self.folder}"
            )
        if not path.exists():
            with written_whole(path, "w", encoding="utf-8") as file:
                file.write(text)
        self._file: IO[str] | None = None

    def done(self) -> bytearray:
        """For each number 1 if it is done."""
        marks = bytearray(self.count)
        for path in self._files():
            for number, _ in lines_of(path):
                marks[number] = 1
        return marks

    def add(self, records: dict[int, Any]) -> None:
        """Keep what was done, as plain data; of one process the numbers rise."""
        if self._file is None:
            self._file = open(self.folder / f"{uuid.uuid4().hex}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._file.writelines(f"{number}\t{json.dumps(record)}\n" for number, record in records.items())
        self._file.flush()

    def merged(self) -> Iterator[tuple[int, Any]]:
        """All that is done, in the order of the numbers, each once."""
        last = -1
        for number, text in heapq.merge(*map(lines_of, self._files()), key=lambda line: line[0]):
            if number != last:
                yield number, json.loads(text)
            last = number

    def close(self) -> None:
        """No more is added by this process."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Once the whole is written."""
        self.close()
        shutil.rmtree(self.folder)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each whole line."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.endswith("\n"):
                number, _, text = line.partition("\t")
                yield int(number), text
