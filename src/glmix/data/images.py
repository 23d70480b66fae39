"""Labelled images in a folder of class folders, or in a tar of one; and the decoding of any image file to RGB."""

import hashlib
import io
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from timm.data import ImageNetInfo

from glmix.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
DRAFT_SIDE = 4096  # a JPEG larger than this is decoded at a fraction of its size
MOST_PIXELS = 178_956_970  # to decode: where Pillow, too, refuses


class BadImage(Exception):  # noqa: N818  (a thing found in the data, not a failure of the program)
    """An image that cannot be used: its name and why."""


def decode(data: bytes, name: str) -> Image.Image:
    """RGB image from the bytes of a file: EXIF rotation applied, transparency put on white, 16 bit brought to 8.

    Its `info["full_size"]` is the size (W, H) of the file's image, of which a huge JPEG is decoded at a fraction.

    Raises:
        BadImage: not an image, damaged, truncated, or of more pixels than can safely be decoded.
    """
    if not data:
        raise BadImage(f"{name}: empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with no_pixel_limit():
                file = Image.open(io.BytesIO(data))
            width, height = file.size
            file.draft("RGB", (DRAFT_SIDE, DRAFT_SIDE))
            if file.width * file.height > MOST_PIXELS:
                raise BadImage(f"{name}: too many pixels to decode safely; save a smaller copy")
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
                values = np.asarray(image, dtype=np.float32)
                top = 65535.0 if image.mode != "F" else max(float(values.max()), 1e-12)
                image = Image.fromarray((255 * values / top).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            image.info["full_size"] = (height, width) if turned else (width, height)
            return image
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error).splitlines()[0][:100]
        raise BadImage(f"{name}: {reason}") from error


@contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Within it Pillow opens any size: a JPEG can be huge, and small at the fraction at which it will be decoded."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_image(path: str | Path) -> Image.Image:
    """`decode` of a file.

    Raises:
        BadImage: as `decode`, or the file cannot be read.
    """
    try:
        return decode(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class ImageSet:
    """Labelled image files of one split.

    Attributes:
        root: the folder or tar.
        files: paths in it, sorted.
        labels: class index of each file.
        classes: class folders' names, sorted; the index of a class is its place here.
        spans: offset and length in the tar of each file; None for a folder.
    """

    root: Path
    files: list[str]
    labels: list[int]
    classes: list[str]
    spans: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        """Class names for people."""
        return readable_names(self.classes)

    def read(self, index: int) -> Image.Image:
        """The image at `index`, decoded.

        Raises:
            BadImage: it cannot be read or decoded.
        """
        name = self.files[index]
        try:
            if self.spans is None:
                data = (self.root / name).read_bytes()
            else:
                offset, length = self.spans[index]
                with open(self.root, "rb") as file:
                    data = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise BadImage(f"{self.root / name}: {error.strerror or error}") from error
        return decode(data, str(self.root / name))

    def take(self, indices: list[int]) -> "ImageSet":
        """The set of only the files at `indices`."""
        return replace(
            self,
            files=[self.files[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            spans=None if self.spans is None else [self.spans[i] for i in indices],
        )


def readable_names(classes: list[str]) -> list[str]:
    """Class labels for people: ImageNet's synset ids become their first lemma, underscores become spaces."""
    if any(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        info = ImageNetInfo("imagenet-22k")
        known = set(info.label_names())
        return [info.label_name_to_description(c).split(",")[0] if c in known else c for c in classes]
    return [c.replace("_", " ") for c in classes]


def load_split(source: str | Path, split: str) -> ImageSet:
    """The images of a folder of class folders, or of a tar of one, for `split` 'train' or 'val'.

    Where the folder holds `train/` and `val/`, those are the splits. Where it holds the classes themselves, 'train' and
    'val' are nine and one tenth of each class, chosen by the files' names, so always the same ones; `load_all` takes
    them together.

    Raises:
        UserError: nothing there, no images, or a single class.
    """
    images, splits = _scan(source)
    if splits:
        if split not in splits:
            raise UserError(
                f"{source}: no {split}/ folder beside {', '.join(sorted(splits))}/; add one, or give a folder of class folders alone"
            )
        chosen = splits[split]
    else:
        chosen = made_split(images.files, split)
    images = images.take(chosen)
    return checked(images, source, split)


def load_evaluation(source: str | Path) -> ImageSet:
    """The images to evaluate on: the `val/` of a folder that has one, else all."""
    images, splits = _scan(source)
    if splits:
        images = images.take(splits.get("val") or splits["train"])
    return checked(images, source, "val", least_classes=1)


def checked(images: ImageSet, source: str | Path, split: str, least_classes: int = 2) -> ImageSet:
    if not images.files:
        raise UserError(
            f"{source}: no images for {split}; expected class folders with {', '.join(SUFFIXES[:4])} … files in them"
        )
    if len(images.classes) < least_classes:
        raise UserError(f"{source}: a single class ({images.classes[0]}); a classifier needs at least two")
    return images


def made_split(files: list[str], split: str) -> list[int]:
    """Indices of 'train' or 'val' where the data has no splits: a tenth, at least one file, chosen by the names alone."""
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32 for name in files]
    limit = max(0.1, min(hashes, default=0) + 2**-32)
    return [i for i, value in enumerate(hashes) if (value < limit) == (split == "val")]


def image_files(root: Path) -> list[str]:
    """Paths of all image files under a folder, relative to it, sorted; linked folders are followed."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def _scan(source: str | Path) -> tuple[ImageSet, dict[str, list[int]]]:
    """All images of a folder or tar, and the indices of each split (none where there are no split folders)."""
    root = Path(source)
    spans: dict[str, tuple[int, int]] | None = None
    if root.is_dir():
        files = image_files(root)
    elif root.is_file():
        try:
            with tarfile.open(root, "r:") as tar:
                spans = {
                    m.name: (m.offset_data, m.size) for m in tar if m.isfile() and m.name.lower().endswith(SUFFIXES)
                }
        except tarfile.TarError as error:
            raise UserError(
                f"{root}: neither a folder nor an uncompressed tar ({error}); unpack it, or pack it again without compression"
            ) from error
        files = sorted(spans)
    else:
        raise UserError(f"{root}: no such folder or tar; --data is a folder of class folders, or a tar of one")
    parts = [Path(file).parts for file in files]
    top = 0  # folders around everything else are passed over
    known = {name for names in SPLITS.values() for name in names}
    while (
        parts
        and all(len(p) > top + 2 for p in parts)
        and len({p[top] for p in parts}) == 1
        and parts[0][top] not in known
    ):
        top += 1
    heads = Counter(p[top] for p in parts if len(p) > top + 2)
    splits: dict[str, list[int]] = {}
    level = top
    if any(name in heads for name in SPLITS["train"] + SPLITS["val"][:3]):
        level = top + 1
        for split, names in SPLITS.items():
            folder = next((name for name in names if name in heads), None)
            if folder:
                splits[split] = [i for i, p in enumerate(parts) if p[top] == folder and len(p) > level + 1]
    kept = (
        sorted(i for indices in splits.values() for i in indices)
        if splits
        else [i for i, p in enumerate(parts) if len(p) > level + 1]
    )
    classes = sorted({parts[i][level] for i in kept})
    index = {name: i for i, name in enumerate(classes)}
    images = ImageSet(
        root,
        files,
        [index.get(p[level], -1) if len(p) > level + 1 else -1 for p in parts],
        classes,
        None if spans is None else [spans[f] for f in files],
    )
    if splits:
        return images, splits
    return images.take(kept), {}
