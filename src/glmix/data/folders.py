"""Class folders, or a tar of them; and the one listing of files by which folders, tars and shards are read."""

import io
import os
import posixpath
import re
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from glmix.data.images import BadImage, decode, is_image
from glmix.data.naming import FILLERS, SPLIT_WORDS, SPLITS, find_splits, one_form, plain_split, split_word, words_of
from glmix.data.samples import DataSet, LeftOut, Source
from glmix.errors import UserError

# What systems, cameras and network drives leave among files, in small letters; hidden names come on top.
RUBBISH = {
    *("__macosx", "$recycle.bin", "system volume information", "lost+found", "lost.dir", "found.000", "__pycache__"),
    *("@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "network trash folder"),
    *("temporary items", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini"),
}
# Words that folders' names are made of in sets for detection and segmentation, where none of them is a class:
PARTS = {
    "label",
    "labels",
    "mask",
    "masks",
    "annotation",
    "annotations",
    "annot",
    "images",
    "image",
    "gt",
    "groundtruth",
}
STREETS = {"leftimg8bit", "gtfine", "gtcoarse"}  # of Cityscapes
COCO = re.compile(r"(annotations/(instances|captions|person_keypoints|stuff|panoptic)_\w+|_annotations\.coco)\.json$")


def is_rubbish(name: str) -> bool:
    """Whether a path within the data has a part that is hidden, or something that a system has left there."""
    lower = name.lower()
    return any(part.startswith((".", "~$")) or part in RUBBISH for part in lower.split("/")) or lower.endswith(
        ":zone.identifier"
    )


@dataclass
class Tree:
    """What lies in a folder or tar, without rubbish; paths in it, with slashes.

    Attributes:
        root: the folder or tar.
        files: all files, in order of their names.
        folders: all folders.
        left_out: what could not be looked into.
        spans: offset and length in the tar of each file; None for a folder.
    """

    root: Path
    files: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left_out: LeftOut = field(default_factory=LeftOut)
    spans: dict[str, tuple[int, int]] | None = None

    def opened(self, name: str) -> Path | IO[bytes]:
        """A file, for what reads its beginning."""
        if self.spans is not None:
            return io.BytesIO(_read_span(self.root, *self.spans[name]))
        path = self.root / name
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no file")
        return path

    def read(self, name: str) -> bytes:
        """All of a file."""
        found = self.opened(name)
        return found.read_bytes() if isinstance(found, Path) else found.read()

    def images(self) -> list[str]:
        """The files that are images. All others are put among what is left out, by their endings."""
        found = []
        for name in self.files:
            if is_image(name, partial(self.opened, name)):
                found.append(name)
            else:
                ending = PurePosixPath(name).suffix
                self.left_out.add(f"no image that can be read ({ending or 'without ending'})", name)
        return found

    @cached_property
    def folders_and_files(self) -> set[str]:
        """All paths there are."""
        return self.folders | set(self.files)

    def pictures(self, paths: list[str]) -> "FolderPictures | TarPictures":
        """The images at these paths."""
        if self.spans is None:
            return FolderPictures(self.root, paths)
        return TarPictures(self.root, paths, [self.spans[path] for path in paths])

    def ending_in(self, *endings: str, below: bool = False) -> list[str]:
        """The files with one of these endings; for `below` only those in a folder of the root."""
        return [n for n in self.files if n.lower().endswith(endings) and ("/" in n or not below)]


def walk(root: Path) -> Tree:
    """All that is in a folder. Links are followed, but not to a folder in which they lie themselves."""
    tree = Tree(root)

    def unreadable(error: OSError) -> None:
        tree.left_out.add(f"folder that cannot be read ({error.strerror})", os.path.relpath(error.filename, root))

    real = {str(root): os.path.realpath(root)}
    for folder, inside, names in os.walk(root, followlinks=True, onerror=unreadable):
        below = "" if folder == str(root) else Path(os.path.relpath(folder, root)).as_posix() + "/"
        inside[:] = [name for name in inside if not is_rubbish(name) and not _returns(folder, name, root, real)]
        tree.folders.update(below + name for name in inside)
        tree.files += [below + name for name in names if not is_rubbish(name)]
    tree.files.sort(key=one_form)
    return tree


def _returns(folder: str, name: str, root: Path, real: dict[str, str]) -> bool:
    """Whether a folder in `folder` is a link to one that is being walked, or to one around it; notes its real place."""
    path = os.path.join(folder, name)
    linked = os.path.islink(path)
    real[path] = os.path.realpath(path) if linked else os.path.join(real[folder], name)
    if not linked:
        return False
    way = [folder]
    while way[-1] != str(root):
        way.append(os.path.dirname(way[-1]))
    return any(os.path.commonpath([real[path], real[step]]) == real[path] for step in way)


def read_tar(root: Path) -> Tree:
    """All that is in a tar; links to files within it are followed.

    Raises:
        UserError: it is none, or compressed.
    """
    tree = Tree(root, spans={})
    spans, links = {}, {}
    try:
        with tarfile.open(root, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")
                if is_rubbish(name):  # and ".", the root itself
                    continue
                if member.isdir():
                    tree.folders.add(name)
                elif member.isfile():
                    spans[name] = member.offset_data, member.size
                elif member.islnk():
                    links[name] = posixpath.normpath(member.linkname)
                elif member.issym():
                    links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{root}: neither a folder nor an uncompressed tar ({error}); unpack it, or pack it again without compression"
        ) from error
    for name, target in links.items():
        if target in spans:
            spans[name] = spans[target]
        else:
            tree.left_out.add("link to what is not in the tar, or a folder", name)
    tree.spans = spans
    tree.files = sorted(spans, key=one_form)
    for name in tree.files:
        tree.folders.update(str(parent) for parent in PurePosixPath(name).parents if parent.name)
    return tree


def image_files(root: Path) -> list[str]:
    """Paths of all image files under a folder, relative to it, sorted; linked folders are followed."""
    return walk(root).images()


def _read_span(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


@dataclass(frozen=True)
class FolderPictures:
    """Image files of a folder, by their paths in it."""

    root: Path
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        path = self.root / self.paths[index]
        try:
            return decode(path.read_bytes(), str(path))
        except OSError as error:
            raise BadImage(str(path), error.strerror or str(error)) from error

    def size(self, index: int) -> int:
        """Bytes of the file, or -1 for a link that leads nowhere, which is found when it is read."""
        try:
            return (self.root / self.paths[index]).stat().st_size
        except OSError:
            return -1


@dataclass(frozen=True)
class TarPictures:
    """Image files of a tar, by their names, and offset and length in it."""

    root: Path
    paths: list[str]
    spans: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        name = str(self.root / self.paths[index])
        try:
            return decode(_read_span(self.root, *self.spans[index]), name)
        except OSError as error:
            raise BadImage(name, error.strerror or str(error)) from error

    def size(self, index: int) -> int:
        return self.spans[index][1]


def scan_folders(source: str, tree: Tree | None = None) -> DataSet:
    """The images of a folder of class folders, or of a tar of one; `tree` is what lies in it, where that is known.

    Where it holds folders for training and validation, those are the splits. Folders around everything else are passed
    over.

    Raises:
        UserError: nothing there, or it is laid out for detection or segmentation.
    """
    root = Path(source)
    if tree is None:
        if not root.exists():
            raise UserError(f"{root}: no such folder or tar; --data is a folder of class folders, or a tar of one")
        tree = walk(root) if root.is_dir() else read_tar(root)
    raw = tree.images()
    parts = [tuple(one_form(name).split("/")) for name in raw]
    top = _content(parts)
    splits = _split_folders(parts, top)
    levels = _class_levels(parts, top, splits)

    def level(p: tuple[str, ...]) -> int:
        """Where in a path its class is; it need not be that long."""
        return levels.get(p[top], len(p)) if splits and len(p) > top else top

    kept = [i for i, p in enumerate(parts) if len(p) > level(p) + 1]
    classes = sorted({parts[i][level(parts[i])] for i in kept})
    _refuse_layouts(source, tree, classes)
    used = {parts[i][: level(parts[i]) + 1] for i in kept}
    for name, p in zip(raw, parts, strict=True):
        if splits and p[top] not in splits and len(p) > top + 1:
            tree.left_out.add(f"image of no split that is used, beside {' and '.join(sorted(splits))}", name)
        elif p[: level(p) + 1] not in used:
            tree.left_out.add("image in no class folder", name)
    for folder in sorted(tree.folders):
        p = tuple(one_form(folder).split("/"))
        if parts and p[:top] == parts[0][:top] and len(p) == level(p) + 1 and p not in used:
            tree.left_out.add("folder without an image that can be read, so no class", folder)

    index = {name: i for i, name in enumerate(classes)}
    paths = [raw[i] for i in kept]
    whole = Source(
        ["/".join(parts[i][top:]) for i in kept],
        tree.pictures(paths),
        [index[parts[i][level(parts[i])]] for i in kept],
        classes,
    )
    named = find_splits([splits.get(parts[i][top], "") for i in kept])
    alone = len(named) == 1 and all(split_word(p[top]) for p in parts if len(p) > top + 1)
    return DataSet(source, whole, {} if alone else named, tree.left_out.listed())


Parts = Sequence[tuple[str, ...]]


def _content(parts: Parts) -> int:
    """How many folders lie around everything else."""
    top = 0
    while (
        parts
        and all(len(p) > top + 2 for p in parts)
        and len({p[top] for p in parts}) == 1
        and not plain_split(parts[0][top])
    ):
        top += 1
    return top


def _split_folders(parts: Parts, top: int) -> dict[str, str]:
    """The folders that are splits, and the word of each, of those the chosen ones; none where they are classes.

    A name like "train" or "Test_Set" says so alone, if there is one for training or validation among them. Others that
    contain such a word, as "imagenet_train", are splits where they hold the same classes.
    """
    inside: dict[str, set[str]] = defaultdict(set)
    for p in parts:
        if len(p) > top + 2:
            inside[p[top]].update(p[top + 1 : -1])
    plain = {name: plain_split(name) for name in inside}
    words = {name: split_word(name) for name in inside}
    train, val = (
        set().union(*(inside[name] for name, word in words.items() if word in SPLITS[split])) for split in SPLITS
    )
    if set(SPLITS["train"]).isdisjoint(plain.values()) or set(SPLITS["val"]).isdisjoint(plain.values()):
        alike = train and val and 2 * len(train & val) >= min(len(train), len(val))
        if not alike and not set(SPLITS["train"] + SPLITS["val"][:3]).intersection(plain.values()):
            return {}
        plain = words if alike else plain
    chosen = {next((w for w in SPLITS[split] if w in plain.values()), "") for split in SPLITS} - {""}
    return {name: word for name, word in plain.items() if word in chosen}


def _class_levels(parts: Parts, top: int, splits: dict[str, str]) -> dict[str, int]:
    """Where in a path its class is, for each of the folders that are splits.

    A split's folder that lies alone in another of that split, as archives unpack, is passed over.
    """
    levels = {}
    for name, word in splits.items():
        mine = [p for p in parts if p[top] == name and len(p) > top + 2]
        level = top + 1
        while (
            all(len(p) > level + 2 and split_word(p[level]) == word for p in mine)
            and len({p[level] for p in mine}) == 1
        ):
            level += 1
        levels[name] = level
    return levels


def _refuse_layouts(source: str, tree: Tree, classes: list[str]) -> None:
    """Raises: UserError: the data is laid out for another task, or its splits hold images without class folders."""
    folders = {folder.rpartition("/")[2] for folder in tree.folders}
    layouts = {
        "PASCAL VOC": "JPEGImages" in folders,
        "COCO": any(COCO.search(name) for name in tree.files),
        "CamVid": any(name.endswith("annot") for name in folders),
        "Cityscapes": bool(STREETS & {name.lower() for name in folders}),
        "YOLO": "images" in folders and "labels" in folders,
    }
    layout = next((name for name, there in layouts.items() if there), None)
    words = {name: [word.removesuffix("annot") or word for word in words_of(name)] for name in classes}
    telling = {*SPLITS["train"], *PARTS}.intersection(word for found in words.values() for word in found)
    parts_alone = bool(telling) and all(_is_part(name, found) for name, found in words.items())
    if not (
        parts_alone
        or (layout and not classes)
        or STREETS & {name.lower() for name in classes}
        or "JPEGImages" in classes
        or any(f"{name}annot" in words for name in words)
    ):
        return
    what = f"looks like a detection or segmentation set ({layout} layout)" if layout else ""
    what = what or f"{', '.join(classes[:4])} hold images, but no class folders"
    raise UserError(f"{source}: {what}; a classifier needs class folders, such as train/cat/1.jpg")


def _is_part(name: str, words: list[str]) -> bool:
    """Whether a folder's name, of these words, is that of a split or of a part of a data set, such as labels."""
    numbered = any(sign.isdigit() for sign in name)  # "label_1" may well be a class, "train2017" is not
    known = set(words) <= {*SPLIT_WORDS, *FILLERS, *PARTS}
    return bool(words) and known and (not numbered or bool(SPLIT_WORDS.intersection(words)))
