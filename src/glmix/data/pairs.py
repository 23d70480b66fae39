"""Which mask belongs to which picture, in folders as people and tools lay them out."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from glmix.data.folders import Tree
from glmix.data.images import OTHERS, READABLE
from glmix.data.naming import SYNONYMS, of_other_splits, one_form, plain_split, words_of
from glmix.data.samples import LeftOut
from glmix.errors import UserError

# Words in folders' names, in small letters:
OF_MASKS = {
    *("mask", "masks", "annotation", "annotations", "annot", "ann", "label", "labels", "gt", "groundtruth"),
    *("segmentation", "segmentations", "seg", "segmap", "segmaps", "semantic", "truth"),
}
OF_PICTURES = {
    "image",
    "images",
    "img",
    "imgs",
    "jpeg",
    "jpg",
    "photo",
    "photos",
    "picture",
    "pictures",
    "rgb",
    "input",
}
OF_OTHERS = {"instance", "instances", "visualization", "visualizations", "overlay", "panoptic"}
BESIDE = {"class", "classes", "png", "raw", "ground", "folder", *OF_MASKS, *OF_PICTURES}  # that tell no place
MASK_ENDING = re.compile(
    r"(.+?)[ _.-]+(masks?|labels?|labelids|gt|seg|segmentation|annotation|annot|l|p)$", re.IGNORECASE
)
PICTURE_ENDING = re.compile(r"(.+?)[ _.-]+(image|img|sat|photo|rgb)$", re.IGNORECASE)
ARRAYS = (".npy", ".npz", ".mat")


class Pair(NamedTuple):
    """Paths of a picture and its mask, and what tells the picture's split: the folders it is in."""

    picture: str
    mask: str
    folders: str


def pair_up(origin: str, tree: Tree, left_out: LeftOut) -> list[Pair]:
    """The pictures that have a mask, in order of their names; all others are named among what is left out.

    Masks lie in a folder whose name says so (masks, annotations, trainannot …), beside, above or below the folders of
    splits; or beside their picture, as x_mask.png, or as x.png where that is x.jpg. They have the picture's name;
    capitals and the Unicode form count only where two would be alike without.

    Raises:
        UserError: no picture has a mask, or a picture or mask has two.
    """
    files = []
    for name in tree.files:
        if name.lower().endswith(READABLE):
            files.append(name)
        elif name.lower().endswith(ARRAYS):
            left_out.add("array, not read; save masks as PNG", name)
        elif not name.lower().endswith(OTHERS):
            left_out.add(f"no image that can be read ({PurePosixPath(name).suffix or 'without ending'})", name)
    top = common_folders(tree.files)
    folders = {name: PurePosixPath(name).parent.parts[top:] for name in files}
    pictures, masks = [], []
    beside = _beside(files)
    for name in files:
        kind = _kind(folders[name])
        if kind == "other":
            left_out.add("mask of instances or picture of masks, not of classes", name)
        elif kind == "mask" or name in beside:
            masks.append(name)
        else:
            pictures.append(name)
    pairs = _matched(origin, pictures, masks, folders, left_out)
    if not pairs:
        raise UserError(
            f"{origin}: no image with a mask in {len(files)} image files; expected folders images/ and masks/ (or "
            "annotations/, labels/) with files of the same names, or x_mask.png beside x.jpg"
        )
    return pairs


def common_folders(files: Sequence[str]) -> int:
    """How many folders lie around everything, but for those that are splits."""
    parents = [PurePosixPath(name).parent.parts for name in files]
    top = 0
    while parents and all(len(p) > top for p in parents) and len({p[top] for p in parents}) == 1:
        if plain_split(parents[0][top]):
            break
        top += 1
    return top


def _words(folder: str) -> list[str]:
    return [part for word in words_of(one_form(folder)) for part in _apart(word)]


def _apart(word: str) -> list[str]:
    """A word, or the two that it is made of, such as train and annot, or ground and truth."""
    for end in ("annot", "masks", "mask", "labels", "truth"):
        if word.endswith(end) and word != end:
            return [word.removesuffix(end), end]
    return [word]


def _kind(folders: Sequence[str]) -> str:
    """'mask', 'picture' or 'other' by the last folder that says which; '' where none does."""
    every = {word for folder in folders for word in _words(folder)}
    if every & OF_MASKS and every & OF_OTHERS:
        return "other"
    for folder in reversed(folders):
        words = set(_words(folder))
        if words & OF_MASKS and words & {"object", "objects"}:
            return "other"
        if words & OF_MASKS:
            return "mask"
        if words & OF_PICTURES:
            return "picture"
    return ""


def _beside(files: Sequence[str]) -> set[str]:
    """Masks beside their pictures: x_mask.png beside x.jpg, or x.png beside x.jpg."""
    stems = {_place(name) for name in files}
    jpegs = {_place(name) for name in files if name.lower().endswith((".jpg", ".jpeg"))}
    found = set()
    for name in files:
        folder, stem = _place(name)
        ending = MASK_ENDING.fullmatch(stem)
        bases = [ending[1] + more for more in ("", "_image", "_img", "_sat")] if ending else []
        twin = name.lower().endswith(".png") and (folder, stem) in jpegs
        if twin or any((folder, base) in stems for base in bases):
            found.add(name)
    return found


def _place(name: str) -> tuple[str, str]:
    path = PurePosixPath(one_form(name).lower())
    return str(path.parent), path.stem


def _key(folders: Sequence[str]) -> tuple[str, ...]:
    """The folders without what says that images or masks are in them: alike for a picture and its mask."""
    found = []
    for folder in folders:
        plain = re.findall(r"\d+|\D+", one_form(folder).lower()) if not _words(folder) else _words(folder)
        numbers = re.findall(r"\d+", folder) if _words(folder) else []
        rest = [SYNONYMS.get(word, word) for word in plain if word not in BESIDE]
        if rest:
            found.append(" ".join([*rest, *numbers]))
    return tuple(found)


def _forms(name: str, ending: re.Pattern[str]) -> list[str]:
    """The stem of a file, and what it may be called without the words and endings that tools add."""
    stem = one_form(PurePosixPath(name).stem).lower()
    found = [stem]
    for _ in range(2):
        match = ending.fullmatch(found[-1])
        if match:
            found.append(match[1])
        if found[-1].endswith(READABLE):
            found.append(found[-1].rpartition(".")[0])
    return list(dict.fromkeys(found))


def _matched(
    origin: str,
    pictures: Sequence[str],
    masks: Sequence[str],
    folders: dict[str, tuple[str, ...]],
    left_out: LeftOut,
) -> list[Pair]:
    by_place: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for mask in masks:
        for form in _forms(mask, MASK_ENDING):
            by_place[_key(folders[mask]), form].append(mask)
            by_stem[form].append(mask)
    counts = Counter(_forms(picture, PICTURE_ENDING)[0] for picture in pictures)
    pairs: list[Pair] = []
    owner: dict[str, str] = {}
    for picture in pictures:
        forms = _forms(picture, PICTURE_ENDING)
        found = next(
            (by_place[_key(folders[picture]), f] for f in forms if (_key(folders[picture]), f) in by_place), []
        )
        if not found and counts[forms[0]] == 1:
            found = next((by_stem[form] for form in forms if form in by_stem), [])
            place = "/".join(folders[picture])
            found = [mask for mask in found if not of_other_splits(place, "/".join(folders[mask]))]
        found = _nearest(picture, found)
        if not found:
            left_out.add("image without a mask", picture)
            continue
        if len(found) > 1:
            raise UserError(f"{origin}: {picture} has two masks, {found[0]} and {found[1]}; leave one of them there")
        if found[0] in owner:
            raise UserError(f"{origin}: {owner[found[0]]} and {picture} have one mask, {found[0]}; rename one of them")
        owner[found[0]] = picture
        pairs.append(Pair(picture, found[0], "/".join(folders[picture])))
    for mask in masks:
        if mask not in owner:
            left_out.add("mask without an image", mask)
    return pairs


def _nearest(picture: str, found: list[str]) -> list[str]:
    """Of several masks those whose stem is most like the picture's: as written, in another Unicode form, but for case."""
    stem = PurePosixPath(picture).stem
    forms: list[Callable[[str], str]] = [str, one_form, lambda text: one_form(text).lower()]
    for form in forms:
        alike = [mask for mask in found if form(PurePosixPath(mask).stem) == form(stem)]
        if alike:
            return alike
    return found
