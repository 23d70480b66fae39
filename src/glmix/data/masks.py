"""Maps of classes: a number for every pixel, read from the masks that lie with pictures."""

import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from glmix.data.class_lists import IGNORED, ClassList, Entry, class_list
from glmix.data.folders import Tree, read_tar, walk
from glmix.data.images import OPENED, BadImage, no_pixel_limit
from glmix.data.naming import named_in_list, plain_split, plain_stem, split_word
from glmix.data.pairs import Pair, common_folders, pair_up
from glmix.data.samples import DataSet, LeftOut, Pictures, Source, in_splits, spread
from glmix.data.scenes import CLASSES, SCENES, SceneSet, scan_scenes, scene_split
from glmix.errors import UserError

Map = NDArray[np.uint8]  # (H, W): class indices, and IGNORED

INEXACT = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF", "HEIF"}  # formats that may change the values a little
LOOKED_AT = 32  # masks, before any training begins
MOST_NUMBERS = 128  # that masks without a list of classes can hold, before they are taken for something else
ADE_CLASSES = 150
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
MISSING = -1


class Refused(BadImage):
    """A mask that is whole, but cannot be read without doubt."""


@dataclass(frozen=True)
class Decoded:
    """A mask file, decoded.

    Attributes:
        values: (H, W) numbers; of a palette its indices. None of a mask in colours.
        colours: (H, W) as red * 65536 + green * 256 + blue; None where there are none.
        palette: colour of each index that is used, where there is a palette.
        upright: whether the file's own EXIF says how it lies; it has been turned.
        repeated: the used indices whose colour a lower index of the palette has too, as beyond a palette's real end.
    """

    values: NDArray[Any] | None
    colours: NDArray[np.int32] | None
    palette: dict[int, int]
    upright: bool
    repeated: frozenset[int] = frozenset()


def decode_mask(opened: Path | IO[bytes], name: str) -> Decoded:
    """The numbers or colours of a mask, exactly.

    Raises:
        Refused: its format or depth does not keep numbers exactly.
        BadImage: it cannot be read.
    """
    try:
        with warnings.catch_warnings(), no_pixel_limit():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(opened, formats=OPENED) as file:
                stored = str(file.tile[0][3]) if file.tile else ""
                problem = _problem(file.format or "", file.mode, stored)
                if problem:
                    raise Refused(name, problem)
                file.load()
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 1
                return _numbers(ImageOps.exif_transpose(file), turned, name)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        raise BadImage(name, (str(error) or type(error).__name__).splitlines()[0][:100]) from error


def _problem(form: str, mode: str, stored: str) -> str:
    """Why a file of this format, mode, and mode of what is stored cannot be a mask; '' where it can."""
    if form in INEXACT:
        return f"a mask as {form}, which does not keep numbers or colours exactly; export the masks again, as PNG"
    if stored in ("L;2", "L;4"):  # Pillow multiplies them to fill 8 bits
        return f"a grey mask of {stored[-1]} bits a pixel; save it with 8"
    if "16" in stored and mode in ("RGB", "RGBA", "LA"):
        return "a mask of 16 bits a channel; save it with 8 bits, or with one channel"
    if mode not in ("1", "L", "P", "I", "F", "RGB", "RGBA", "LA", "PA") and not mode.startswith("I;16"):
        return f"a mask of mode {mode}; save it in grey, with a palette, or in RGB"
    return ""


def _numbers(image: Image.Image, turned: bool, name: str) -> Decoded:
    if image.mode in ("RGBA", "LA", "PA"):
        image = _without_alpha(image, name)
    values = np.asarray(image)
    if image.mode == "P":
        table = np.reshape(image.getpalette("RGB") or [], (-1, 3))
        used = [int(i) for i in np.flatnonzero(np.bincount(values.ravel())) if i < len(table)]
        colours = [_packed(colour) for colour in table]
        repeated = frozenset(i for i in used if colours.index(colours[i]) < i)
        return Decoded(values, None, {i: colours[i] for i in used}, turned, repeated)
    if image.mode == "RGB":
        if (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all():
            return Decoded(values[..., 0], _together(values), {}, turned)
        return Decoded(None, _together(values), {}, turned)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and (values == np.round(values)).all()):
            raise Refused(name, "a mask of numbers that are not whole")
        values = values.astype(np.int64)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise Refused(name, f"a mask with the number {values.min() if values.min() < 0 else values.max()}")
    return Decoded(values, None, {}, turned)


def _without_alpha(image: Image.Image, name: str) -> Image.Image:
    """The image as it is stored, where its alpha says nothing beyond what is there and what is not.

    Raises:
        Refused: it is partly transparent, or has colours where nothing can be seen.
    """
    alpha = np.asarray(image.getchannel("A"))
    if image.mode != "PA" and len(np.unique(alpha)) > 1 and not np.asarray(image)[..., :-1].any():
        raise Refused(name, "a mask that says nothing but by its alpha channel; save that as grey")
    if ((alpha > 0) & (alpha < 255)).any():
        raise Refused(name, "a mask that is partly transparent, so its edges are mixed; export it without smoothing")
    plain = image.convert({"RGBA": "RGB", "LA": "L", "PA": "RGB"}[image.mode])
    if np.asarray(plain)[alpha == 0].any():
        raise Refused(name, "a mask with colours where it is transparent; save it without an alpha channel")
    return plain


def _together(pixels: NDArray[Any]) -> NDArray[np.int32]:
    return pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)


def _packed(colour: Iterable[Any]) -> int:
    red, green, blue = (int(part) for part in colour)
    return red * 65536 + green * 256 + blue


def _in_words(packed: int) -> str:
    return f"{packed >> 16},{packed >> 8 & 255},{packed & 255}"


@dataclass(frozen=True)
class Meaning:
    """What the numbers and colours of a data set's masks mean.

    Attributes:
        classes: names.
        values: class index, or IGNORED, of each number.
        colours: the same of each packed colour; empty where nothing tells it.
        told_by: the file that says so, for messages.
        palette: what colour each index has in masks whose palette alone is known; they must agree.
    """

    classes: list[str]
    values: dict[int, int]
    colours: dict[int, int]
    told_by: str
    palette: dict[int, int]

    @property
    def grey(self) -> bool:
        """Whether all colours that are told are greys, so that masks of one channel hold them."""
        return bool(self.colours) and all(len({c >> 16, c >> 8 & 255, c & 255}) == 1 for c in self.colours)

    def indices(self, mask: Decoded, name: str) -> Map:
        """The map of a mask. Colours count where they are told, also those of a palette; else numbers.

        Raises:
            Refused: it has a number or colour of which nothing is told.
        """
        if mask.values is None or (mask.colours is not None and self.colours):
            return self._of_colours(mask, name)
        if mask.palette:
            return self._of_palette(mask, name)
        if self.grey:
            return _looked_up(mask.values, {c & 255: i for c, i in self.colours.items()}, self._unknown, name)
        return _looked_up(mask.values, self.values, self._unknown, name)

    def _of_colours(self, mask: Decoded, name: str) -> Map:
        if not self.colours:
            raise Refused(name, "a mask in colours, and nothing tells their classes; add class_dict.csv, its first line "
                                "name,r,g,b, or CVAT's labelmap.txt")  # fmt: skip
        assert mask.colours is not None
        keys = np.array(sorted(self.colours))
        places = np.searchsorted(keys, mask.colours).clip(0, len(keys) - 1)
        unknown = keys[places] != mask.colours
        if unknown.any():
            found = _in_words(int(mask.colours[unknown].min()))
            raise Refused(
                name, f"{unknown.mean():.1%} of the mask is of colours that {self.told_by} does not have ({found} …)"
            )
        return np.array([self.colours[int(key)] for key in keys], np.uint8)[places]

    def _of_palette(self, mask: Decoded, name: str) -> Map:
        assert mask.values is not None
        void = {IGNORED: IGNORED} if self.values.get(IGNORED, IGNORED) == IGNORED else {}
        unclear = mask.repeated - set(void)
        known = {i: self.colours[c] for i, c in mask.palette.items() if c in self.colours}
        for i in mask.repeated & set(void):
            known.pop(i, None)
        if unclear & set(known):
            other = min(unclear & set(known))
            raise Refused(
                name,
                f"number {other} has the colour of a lower number in the mask's palette ({_in_words(mask.palette[other])}), so "
                "that nothing tells its class; give each number a colour of its own, or save the mask in grey",
            )
        if known and set(mask.palette) - set(void) <= set(known):
            return _looked_up(mask.values, void | known, self._unknown, name)
        if known:
            other = next(i for i in mask.palette if i not in known)
            raise Refused(
                name,
                f"{self.told_by} have some colours of the mask's palette, but not {_in_words(mask.palette[other])}; list it too",
            )
        other = next((i for i, c in mask.palette.items() if self.palette.get(i, c) != c), MISSING)
        if other != MISSING:
            raise Refused(name, f"number {other} is {_in_words(mask.palette[other])} in this mask's palette, and "
                                f"{_in_words(self.palette[other])} in another's; add class_dict.csv (name,r,g,b)")  # fmt: skip
        return _looked_up(mask.values, self.values, self._unknown, name)

    def _unknown(self, value: int) -> str:
        hint = "; list what 0 is first: '0 background', or '0 void' where it is no class" if value == 0 else ""
        return f"the mask has the number {value}, which is none of {self.told_by}{hint}"


def _looked_up(values: NDArray[Any], table: dict[int, int], unknown: Any, name: str) -> Map:
    lookup = np.full(max(int(values.max(initial=0)), *table) + 1, MISSING, np.int16)
    lookup[list(table)] = list(table.values())
    found = lookup[values]
    if found.min(initial=0) == MISSING:
        raise Refused(name, unknown(int(values[found == MISSING].min())))
    return found.astype(np.uint8)


@dataclass(frozen=True)
class MapFiles:
    """The maps of pictures, read from masks; as large as each picture is upright.

    `mark` tells the bytes of a mask.
    """

    tree: Tree
    paths: list[str]
    pictures: list[str]
    meaning: Meaning
    sizes: Pictures

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Map:
        """The map at `index`.

        Raises:
            BadImage: mask or picture cannot be read, or they differ in size.
        """
        mask = self.decoded(index)
        return self._as_its_picture(self.meaning.indices(mask, self.paths[index]), mask.upright, index)

    def decoded(self, index: int) -> Decoded:
        path = self.paths[index]
        try:
            return decode_mask(self.tree.opened(path), path)
        except OSError as error:
            raise BadImage(path, error.strerror or str(error)) from error

    def mark(self, index: int) -> str:
        return str(self.sizes.size(index))

    def _as_its_picture(self, found: Map, upright: bool, index: int) -> Map:
        """The map turned as its picture is. Masks are drawn on photos as they are shown or as they are stored: size tells."""
        name = self.paths[index]
        width, height, orientation = self._frame(index)
        stored = (height, width)
        shown = (width, height) if orientation >= 5 else stored
        if found.shape == shown and (upright or orientation == 1 or shown != stored):
            return found
        if found.shape not in (shown, stored):
            raise Refused(name, f"a mask of {found.shape[1]} x {found.shape[0]} pixels; {self.pictures[index]} is of "
                                f"{shown[1]} x {shown[0]}")  # fmt: skip
        if shown == stored:
            raise Refused(name, f"{self.pictures[index]} is turned by EXIF (orientation {orientation}), and nothing tells "
                                "whether its mask is; save the photo upright, without EXIF")  # fmt: skip
        image = Image.fromarray(found)
        image.getexif()[ExifTags.Base.Orientation] = orientation
        return np.asarray(ImageOps.exif_transpose(image))

    def _frame(self, index: int) -> tuple[int, int, int]:
        """Width and height of a picture as it is stored, and its EXIF orientation."""
        path = self.pictures[index]
        try:
            with no_pixel_limit(), Image.open(self.tree.opened(path), formats=OPENED) as file:
                orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
                return file.width, file.height, orientation if orientation in range(1, 9) else 1
        except Exception as error:  # as in `decode_mask`
            raise BadImage(path, (str(error) or type(error).__name__).splitlines()[0][:100]) from error


@dataclass(frozen=True)
class SceneMaps:
    """The maps of generated scenes: 0 is background."""

    places: Sequence[tuple[SceneSet, int]]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Map:
        scenes, place = self.places[index]
        return scenes.scene(place).semantic

    def mark(self, index: int) -> str:
        return ""


def open_maps(data: str | Path) -> DataSet:
    """Pictures with a map of classes each: a folder or tar of images and masks, or generated scenes.

    Raises:
        UserError: nothing there, or nothing that can be read without doubt; names the file.
    """
    name, path = str(data), Path(data)
    if name == SCENES:
        return _scene_maps()
    if not path.exists():
        raise UserError(f"{name}: no such folder or tar; --data is a folder of images and masks, or a tar of one")
    tree = walk(path) if path.is_dir() else read_tar(path)
    left_out = tree.left_out
    pairs = pair_up(name, tree, left_out)
    masks = [pair.mask for pair in pairs]
    pictures = [pair.picture for pair in pairs]
    unknown = Meaning([], {}, {}, "", {})
    files = MapFiles(tree, masks, pictures, unknown, tree.pictures(masks))
    files = replace(files, meaning=_meaning(name, files, left_out))
    top = common_folders(tree.files)
    shown = ["/".join(PurePosixPath(picture).parts[top:]) for picture in pictures]
    whole = Source(shown, tree.pictures(pictures), files, files.meaning.classes)
    return in_splits(name, whole, _split_words(name, tree, pairs), left_out, least_classes=1)


def _scene_maps() -> DataSet:
    labelled = scan_scenes()
    places = [(source.pictures, i) for source in map(scene_split, ("train", "val")) for i in range(len(source))]
    whole = labelled.whole
    maps = Source(whole.files, whole.pictures, SceneMaps(places), ["background", *CLASSES])
    return DataSet(SCENES, maps, labelled.named, least_classes=1)


# --- what the masks mean


def _meaning(origin: str, files: MapFiles, left_out: LeftOut) -> Meaning:
    """What the masks of a data set mean, after a look at some of them.

    Raises:
        UserError: nothing tells it, or what tells it is not so; names a mask.
    """
    listed = class_list(origin, files.tree)
    ade = _is_ade(files, listed)
    if ade:
        listed = ade_classes(listed)
    elif listed is None:
        listed = _voc_classes(files)
    palette = _palette(origin, files) if listed is None or not listed.colours() else {}
    if listed is None:
        listed = _numbers_found(origin, files)
        left_out.add("no list of classes, such as classes.txt, so numbers found in masks are the classes",
                     ", ".join(listed.classes[:8]) + (" …" if len(listed.classes) > 8 else ""))  # fmt: skip
    for entry in listed.entries:
        if entry.void:
            left_out.add("no class: its pixels are ignored", entry.name)
    colours = {_packed(colour): index for colour, index in listed.colours().items()}
    told_by = f"the {len(listed.classes)} classes of {listed.file}"
    meaning = Meaning(listed.classes, listed.values(), colours, told_by, palette)
    if not meaning.grey:
        meaning = _if_binary(origin, files, meaning)
    looked = replace(files, meaning=meaning)
    for index in spread(len(files), LOOKED_AT):
        try:
            looked[index]
        except Refused as error:
            raise UserError(f"{origin}: {error}") from error
        except BadImage:  # named when it is read
            continue
    return meaning


def _masks(origin: str, files: MapFiles, places: Iterable[int]) -> Iterator[tuple[str, Decoded]]:
    """The masks that can be read.

    Raises:
        UserError: one is of a form that cannot be a mask.
    """
    for index in places:
        try:
            yield files.paths[index], files.decoded(index)
        except Refused as error:
            raise UserError(f"{origin}: {error}") from error
        except BadImage:  # named when it is read
            continue


def _palette(origin: str, files: MapFiles) -> dict[int, int]:
    """The colour of each index in masks with palettes, from some of them."""
    found: dict[int, int] = {}
    for _, mask in _masks(origin, files, spread(len(files), LOOKED_AT)):
        found = mask.palette | found
    return found


def _numbers_found(origin: str, files: MapFiles) -> ClassList:
    """Classes of data that lists none: the numbers in all of its masks."""
    seen: set[int] = set()
    for name, mask in _masks(origin, files, range(len(files))):
        if mask.values is None:
            raise UserError(f"{origin}: {name}: a mask in colours, and nothing tells their classes; add class_dict.csv, "
                            "its first line name,r,g,b, or CVAT's labelmap.txt")  # fmt: skip
        seen.update(np.unique(mask.values).tolist())
        if len(seen) > MOST_NUMBERS:
            raise UserError(
                f"{origin}: {len(seen)} numbers in its masks (up to {name}): smoothed edges, or objects counted? If they are "
                "classes, list them in classes.txt"
            )
    if seen == {0, IGNORED}:
        raise _binary_refused(origin, files.paths[0])
    numbers = sorted(seen - {IGNORED})
    if not numbers:
        raise UserError(f"{origin}: no mask with any class (first: {files.paths[0]})")
    return ClassList("the masks", [Entry(str(number), number) for number in numbers])


def _binary_refused(origin: str, name: str) -> UserError:
    return UserError(
        f"{origin}: masks hold 0 and 255 alone (first: {name}), and 255 is for what is ignored; name two classes in "
        "classes.txt, such as background and object, to read 255 as the second"
    )


def _if_binary(origin: str, files: MapFiles, meaning: Meaning) -> Meaning:
    """`meaning`, for which 255 is the second of two classes where all masks hold 0 and 255 alone."""
    if meaning.values.get(IGNORED) != IGNORED:
        return meaning
    some = spread(len(files), LOOKED_AT)
    seen: set[int] = set()
    for _, mask in _masks(origin, files, [*some, *sorted(set(range(len(files))) - set(some))]):
        if mask.values is None or (mask.palette and meaning.colours) or (mask.colours is not None and meaning.colours):
            return meaning
        seen.update(np.unique(mask.values).tolist())
        if seen - {0, IGNORED}:
            return meaning
    if IGNORED not in seen:
        return meaning
    if 0 not in seen:
        raise UserError(f"{origin}: masks hold 255 alone (first: {files.paths[0]}), and that is for what is ignored")
    if meaning.values != {0: 0, 1: 1, IGNORED: IGNORED}:
        raise _binary_refused(origin, files.paths[0])
    return replace(meaning, values={0: 0, IGNORED: 1})


def _is_ade(files: MapFiles, listed: ClassList | None) -> bool:
    """Whether masks are ADE20K's: by its list of objects, or by its folders where they hold its 150 numbers."""
    if listed is not None:
        return PurePosixPath(listed.file).name.lower() == "objectinfo150.txt"
    if not all(re.search(r"(^|/)annotations/(training|validation)/", name) for name in files.paths):
        return False
    found = [mask.values for _, mask in _masks(files.tree.root.name, files, spread(len(files), LOOKED_AT))]
    return max((int(values.max(initial=0)) for values in found if values is not None), default=0) == ADE_CLASSES


def ade_classes(listed: ClassList | None) -> ClassList:
    """ADE20K's classes: the numbers from 1, of which one is taken; 0 is ignored."""
    entries = listed.entries if listed else [Entry(str(n), n) for n in range(1, ADE_CLASSES + 1)]
    return ClassList(listed.file if listed else "ADE20K", [Entry("void", 0), *entries])


def _voc_classes(files: MapFiles) -> ClassList | None:
    """PASCAL VOC's classes, where the folders are its own, and the XML files beside them name no others."""
    if not all("SegmentationClass" in PurePosixPath(name).parts for name in files.paths):
        return None
    beside = [name for name in files.tree.ending_in(".xml") if "Annotations" in PurePosixPath(name).parts]
    named: set[str] = set()
    for place in spread(len(beside), LOOKED_AT):
        opened = files.tree.opened(beside[place])
        try:
            root = ElementTree.fromstring(opened.read_bytes() if isinstance(opened, Path) else opened.read())
        except (ElementTree.ParseError, OSError):
            continue
        named.update(found.text or "" for found in root.iterfind("object/name"))
    if not named or not named <= set(VOC_CLASSES):
        return None
    return ClassList("PASCAL VOC", [Entry(name, i) for i, name in enumerate(["background", *VOC_CLASSES])])


# --- splits


def _split_words(origin: str, tree: Tree, pairs: Sequence[Pair]) -> list[str]:
    """The word of each picture's split: by its folders, else by lists of names such as train.txt."""
    words = [next((w for f in reversed(p.folders.split("/")) if (w := split_word(f))), "") for p in pairs]
    if any(words):
        return words
    lists = {}
    stems = [plain_stem(pair.picture) for pair in pairs]
    known = set(stems)
    for name in tree.ending_in(".txt"):
        word = plain_split(PurePosixPath(name).stem)
        if word:
            opened = tree.opened(name)
            text = (opened.read_bytes() if isinstance(opened, Path) else opened.read()).decode(errors="replace")
            listed = {named_in_list(line, known) for line in text.splitlines() if line.strip()}
            found = [i for i, stem in enumerate(stems) if stem in listed]
            if found and (word not in lists or "segmentation" in name.lower()):
                lists[word] = (name, found)
    for word, (name, found) in lists.items():
        for i in found:
            if words[i]:
                raise UserError(
                    f"{origin}: {pairs[i].picture} is in {name} and in {lists[words[i]][0]}; leave it in one"
                )
            words[i] = word
    if lists and not {"train", "training"} & set(lists):  # a list of what is held out is enough
        words = [word or "train" for word in words]
    return words
