"""WebDataset shards: tars of samples, each a few files of one key (`0012.jpg`, `0012.cls`).

Shards are usually streamed, which gives up an exact order: what comes next depends on workers and buffers. Here the tars
are read through once for where each image lies. So order and augmentation depend on (seed, epoch, index) alone, as with
folders, and a run that was cut goes on as if it had not been. That takes local tars without compression; nothing is
written beside them.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from glmix.data.folders import TarPictures, Tree, is_rubbish
from glmix.data.images import OTHERS, READABLE, is_image
from glmix.data.naming import label_of, number_labels, split_word
from glmix.data.samples import DataSet, LeftOut, Several, Source, by_words
from glmix.errors import UserError

Member = tarfile.TarInfo


class Shard(TarPictures):
    """The images of a shard; in digests they count by their names alone."""

    def size(self, index: int) -> int:
        return 0


def scan_shards(source: str, tree: Tree | None = None) -> DataSet:
    """The labelled images of a folder of shards (`tree` is what lies in it), a pattern or one shard.

    Classes are the lines of `classes.txt` beside the shards; without it the labels: texts, or numbers. Samples without
    an image or a label are passed over. Files are named as in the shard, and by the shard too where a split has two of one name.

    Raises:
        UserError: no such shards, one that cannot be read, or no labels in any.
    """
    root = Path(source)
    tars = tree.ending_in(".tar") if tree else []
    paths = [str(root / name) for name in sorted(tars, key=lambda name: name.split("/"))] or find_shards(source)
    left_out = tree.left_out if tree else LeftOut()
    base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    shards, labels, words, files = [], [], [], []
    for path in paths:
        shard, found = _index(path, left_out)
        name = Path(os.path.relpath(path, base)).as_posix()
        shards.append(shard)
        labels += found
        words += [split_word(name)] * len(shard)
        files += [(name, file) for file in shard.paths]
    if not files:
        raise UserError(f"{source}: no labelled images; samples are KEY.jpg (or png, webp …) and KEY.cls or KEY.json")
    lists = [folder / "classes.txt" for folder in (root, Path(paths[0]).parent)]
    listed = next((file for file in lists if file.is_file()), None)
    names = (
        [line.strip() for line in listed.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        if listed
        else None
    )
    targets, classes = number_labels(labels, names, str(listed or source))
    alike = len({(word, file) for word, (_, file) in zip(words, files, strict=True)}) < len(files)
    whole = Source(
        ["/".join(parts) if alike else parts[1] for parts in files],
        Several([(shard, i) for shard in shards for i in range(len(shard))]),
        targets,
        classes,
    )
    return by_words(source, whole, words, left_out)


def is_shard(path: str) -> bool:
    """Whether a tar's first image has its label beside it and lies in no folder, which could be its class."""
    with _open(path) as tar:
        image, label = next((pair for pair in _samples(tar) if pair[0]), (None, None))
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


def _index(path: str, left_out: LeftOut) -> tuple[Shard, list[int | str]]:
    """The labelled images of a shard, and their labels."""
    found, labels = [], []
    with _open(path) as tar:
        for image, described in _samples(tar):
            label = _label(tar, described, path) if image and described else None
            if image and label is not None:
                found.append(image)
                labels.append(label)
            elif image:
                left_out.add("sample without a label", f"{path}/{image.name}")
            elif described:
                left_out.add("sample without an image that can be read", f"{path}/{described.name}")
    return Shard(Path(path), [m.name for m in found], [(m.offset_data, m.size) for m in found]), labels


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[Member | None, Member | None]]:
    """Image and label file of each sample."""
    named = (
        (*_key_and_suffix(member.name), member)
        for member in tar
        if member.isfile() and not is_rubbish(member.name.removeprefix("./"))
    )
    for _, members in groupby(named, key=lambda part: part[0]):
        parts = {suffix: member for _, suffix, member in members}
        image = next((member for suffix, member in parts.items() if suffix in READABLE), None)
        image = image or next((m for suffix, m in parts.items() if _image_within(tar, suffix, m)), None)
        yield image, parts.get(".cls", parts.get(".json"))


def _image_within(tar: tarfile.TarFile, suffix: str, member: Member) -> bool:
    """Whether a file of an ending that says nothing is an image."""
    if suffix.count(".") > 1 or suffix in OTHERS:  # "seg.png" is something else than the image
        return False
    file = tar.extractfile(member)
    return file is not None and is_image(suffix, lambda: io.BytesIO(file.read()))


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's name split at the first dot after its folders, as WebDataset does it."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, dot + suffix.lower()


def _label(tar: tarfile.TarFile, member: Member, path: str) -> int | str | None:
    """The label that a file of a sample holds; None if a JSON has none, or a number below 0 says that there is none."""
    file = tar.extractfile(member)
    try:
        value = file.read().decode() if file else ""
        if member.name.lower().endswith(".json"):
            record = json.loads(value)
            value = record.get("label", record.get("cls"))
        return label_of(value)
    except (ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}/{member.name}: holds no label ({error}); write the shard again") from error
