"""The decoding of any image file to RGB, and what is an image at all."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

with suppress(ImportError):  # where it is installed, photos of telephones are read too
    from pillow_heif import register_heif_opener

    register_heif_opener()

FORMATS = "AVIF BMP DIB GIF HEIF JPEG JPEG2000 MPO PNG PPM QOI TIFF WEBP".split()  # of Pillow's; none runs a program
READABLE = tuple(sorted(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS))
OPENED = [form for form in FORMATS if form in Image.OPEN]
# Endings of what lies beside images, and is not looked into:
OTHERS = tuple(".txt .json .jsonl .xml .csv .tsv .cls .id .md .html .yaml .yml .toml .log .py .npy .npz .mat".split())
DRAFT_SIDE = 4096  # a JPEG larger than this is decoded at a fraction of its size
MOST_PIXELS = 178_956_970  # to decode: where Pillow, too, refuses
MOST_MEASURED = {"f": 1e30, "i": 2**31 - 1, "u": 2**32 - 1}  # by kind of number: these and beyond are fillers


class BadImage(Exception):  # noqa: N818  (a thing found in the data, not a failure of the program)
    """An image that cannot be used: its name, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def full_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of the file's image, of which `picture` may be a fraction (`decode`); else its own."""
    return picture.info.get("full_size", picture.size)


def decode(data: bytes, name: str) -> Image.Image:
    """RGB image from the bytes of a file: EXIF rotation applied, transparency put on white, other depths brought to 8 bit.

    Its `info["full_size"]` is the size (W, H) of the file's image, of which a huge JPEG is decoded at a fraction, and
    `info["orientation"]` the EXIF rotation that was applied (1: none).

    Raises:
        BadImage: not an image, damaged, truncated, or of more pixels than can safely be decoded.
    """
    if not data:
        raise BadImage(name, "empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with no_pixel_limit():
                file = Image.open(io.BytesIO(data), formats=OPENED)
            width, height = file.size
            file.draft("RGB", (DRAFT_SIDE, DRAFT_SIDE))
            if file.width * file.height > MOST_PIXELS:
                raise BadImage(name, "too many pixels to decode safely; save a smaller copy")
            orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
            image: Image.Image = file
            if file.mode in ("I", "F") or file.mode.startswith("I;16"):
                image = _eight_bits(file, name)
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            image.info["full_size"] = (height, width) if orientation >= 5 else (width, height)
            image.info["orientation"] = orientation if orientation in range(1, 9) else 1
            return image
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage(name, "not an image in a format that is read") from error
    except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
        raise BadImage(name, (str(error) or type(error).__name__).splitlines()[0][:100]) from error


def _eight_bits(file: Image.Image, name: str) -> Image.Image:
    """Grey of 8 bits from a picture of numbers: 16 bit (12 where the file says so), 32 bit, or floating point.

    16 bits count in full, unless no value needs more than 12, as cameras and microscopes give them: these count as 12,
    for as 16 they would be black. What is wider or signed is a measurement, with a range of its own: from 0 to the largest value
    found, or to 255 where integers fit into 8 bits. What is not a number becomes black.

    Raises:
        BadImage: no value is a number above 0, and not all are 0.
    """
    tags = getattr(file, "tag_v2", {})
    values = np.asarray(file)
    if file.mode == "I" and tags and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)  # Pillow has no unsigned mode, and gives the upper half as negative
    if file.mode.startswith("I;16") or (file.mode == "I" and not tags):
        bits = min(16, tags.get(BITS_PER_SAMPLE, (16,))[0])
        top = 2.0 ** (12 if values.max(initial=0) < 4096 else bits) - 1
    else:
        usable = values[np.isfinite(values) & (np.abs(values.astype(np.float64)) < MOST_MEASURED[values.dtype.kind])]
        if not usable.size or (usable.max() <= 0 and usable.min() < 0):
            raise BadImage(name, "no values above 0" if usable.size else "no finite values")
        top = 255.0 if values.dtype.kind != "f" and usable.max() <= 255 else float(usable.max()) or 1.0
    shares = np.nan_to_num(values.astype(np.float64) / top, nan=0.0)
    grey = Image.fromarray((255 * shares.clip(0, 1)).astype(np.uint8))
    grey.info.update(file.info)
    grey.getexif()[ExifTags.Base.Orientation] = file.getexif().get(ExifTags.Base.Orientation, 1)
    return grey


SAMPLE_FORMAT, BITS_PER_SAMPLE = 339, 258  # tags of TIFF


def is_image(name: str, opened: Callable[[], Path | IO[bytes]]) -> bool:
    """Whether a file is taken for an image: by its ending, or, where that says nothing, by what is in it."""
    lower = name.lower()
    if lower.endswith(READABLE) or lower.endswith(OTHERS):
        return lower.endswith(READABLE)
    try:
        with no_pixel_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(opened(), formats=OPENED).close()
    except Exception:  # as in `decode`
        return False
    return True


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
        raise BadImage(str(path), error.strerror or str(error)) from error
