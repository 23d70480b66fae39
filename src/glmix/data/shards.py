"""WebDataset shards: tars of samples, each a few files of one key (`0012.jpg`, `0012.cls`).

Shards are usually streamed, which gives up an exact order: what comes next depends on workers and buffers. Here the tars
are read through once for where each image lies. So order and augmentation depend on (seed, epoch, index) alone, as with
folders, and a run that was cut goes on as if it had not been. That takes local tars without compression; nothing is
written beside them.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path

from glmix.data.images import SUFFIXES, ImageSet
from glmix.data.samples import Label, SampleSet, number_labels, split_word
from glmix.errors import UserError

Member = tarfile.TarInfo


def scan_shards(source: str) -> tuple[SampleSet, list[str]]:
    """The labelled images of a folder of shards, a pattern or one shard, and the split word of each.

    Classes are the lines of `classes.txt` beside the shards; without it the labels: texts, or numbers. Samples without
    an image or a label are passed over.

    Raises:
        UserError: no such shards, one that cannot be read, or no labels in any.
    """
    root = Path(source)
    found = [str(path) for path in sorted(root.rglob("*.tar")) if path.is_file()]
    paths = found if root.is_dir() else find_shards(source)
    shards = [_index(path, Path(path).stat().st_mtime_ns) for path in paths]
    places = [(shard, i) for shard, _ in shards for i in range(len(shard))]
    if not places:
        raise UserError(f"{source}: no labelled images; samples are KEY.jpg (or png, webp …) and KEY.cls or KEY.json")
    lists = [folder / "classes.txt" for folder in (root, Path(paths[0]).parent)]
    listed = next((file for file in lists if file.is_file()), None)
    names = (
        [line.strip() for line in listed.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        if listed
        else None
    )
    labels, classes = number_labels([label for _, labels in shards for label in labels], names, str(listed))
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    words = [split_word(os.path.relpath(path, base)) for path in paths]
    words = [word for word, (shard, _) in zip(words, shards, strict=True) for _ in range(len(shard))]
    return SampleSet(root, [shard.files[i] for shard, i in places], labels, classes, places=places), words


def is_shard(path: str) -> bool:
    """Whether a tar's first image has its label beside it and lies in no folder, which could be its class."""
    with _open(path) as tar:
        image, label = next(_samples(tar), (None, None))
        return image is not None and label is not None and "/" not in image.name.removeprefix("./")


def find_shards(pattern: str) -> list[str]:
    """The files that a pattern of braces and wildcards stands for, `train-{0000..0009}.tar` or `*.tar`.

    Raises:
        UserError: one that it names is not there.
    """
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError(f"{pattern}: no such tar; --data names local .tar files, or their folder")
        return paths
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    parts = brace[1].split(",")
    if numbers:
        parts = [str(i).zfill(len(numbers[1])) for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    before, after = pattern[: brace.start()], pattern[brace.end() :]
    return [path for part in parts for path in find_shards(before + part + after)]


@contextmanager
def _open(path: str) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except (tarfile.TarError, OSError) as error:
        reason = f"not a whole, uncompressed tar ({error}); fetch it again, or pack it again without compression"
        raise UserError(f"{path}: {reason}") from error


@cache  # a command asks for the splits one by one
def _index(path: str, changed: int) -> tuple[ImageSet, list[Label]]:
    """The labelled images of a shard, and their labels; read anew where the file has `changed` since."""
    found = []
    with _open(path) as tar:
        for image, described in _samples(tar):
            if described and (label := _label(tar, described, path)) is not None:
                found.append((image.name, (image.offset_data, image.size), label))
    return ImageSet(Path(path), [row[0] for row in found], [], [], [row[1] for row in found]), [row[2] for row in found]


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[Member, Member | None]]:
    """Image and label file of each sample."""
    named = ((*_key_and_suffix(member.name), member) for member in tar if member.isfile())
    for _, members in groupby(named, key=lambda part: part[0]):
        parts = {suffix: member for _, suffix, member in members}
        image = next((member for suffix, member in parts.items() if suffix in SUFFIXES), None)
        if image:
            yield image, parts.get(".cls", parts.get(".json"))


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's name split at the first dot after its folders, as WebDataset does it."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, dot + suffix.lower()


def _label(tar: tarfile.TarFile, member: Member, path: str) -> Label | None:
    """The label that a file of a sample holds; None if a JSON has none, or a number below 0 says that there is none."""
    file = tar.extractfile(member)
    try:
        text = file.read().decode().strip() if file else ""
        if member.name.lower().endswith(".json"):
            record = json.loads(text)
            value = record.get("label", record.get("cls"))
            if not isinstance(value, str | int | None):
                raise ValueError(f"{value!r} is neither a number nor a name")
            text = "" if value is None else str(value).strip()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}/{member.name}: holds no label ({error}); write the shard again") from error
    if re.fullmatch(r"-?\d+", text):
        return int(text) if int(text) >= 0 else None
    return text or None
