"""Any image file becomes RGB or a named reason; folders and tars become labelled sets."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from glmix import UserError
from glmix.data.folders import scan_folders
from glmix.data.images import READABLE, BadImage, decode, read_image
from glmix.data.naming import readable_names
from glmix.data.prepare import Augmentation, Preparation, training_transform
from glmix.data.sources import open_evaluation, open_split


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


GREEN = Image.new("RGB", (20, 10), (10, 200, 30))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(GREEN, "JPEG", quality=95), (10, 200, 30)),
        (encoded(GREEN.convert("CMYK"), "JPEG", quality=95), (10, 200, 30)),
        (encoded(GREEN.quantize(8), "PNG"), (10, 200, 30)),
        (encoded(GREEN.convert("L"), "PNG"), (124, 124, 124)),
        (encoded(Image.fromarray(np.full((10, 20), 40000, np.uint16)), "PNG"), (155, 155, 155)),
        (encoded(Image.new("RGBA", (20, 10), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("LA", (20, 10), (90, 255)), "PNG"), (90, 90, 90)),
        (encoded(GREEN, "WEBP", lossless=True), (10, 200, 30)),
        (encoded(Image.fromarray(np.full((10, 20), 0.5, np.float32)), "TIFF"), (255, 255, 255)),
    ],
    ids=["jpeg", "cmyk", "palette", "grey", "16-bit", "transparent", "grey-alpha", "webp", "float"],
)
def test_every_mode_becomes_rgb(data: bytes, expected: tuple[int, int, int]):
    image = decode(data, "x")
    assert image.mode == "RGB"
    assert image.size == (20, 10)
    assert np.abs(np.asarray(image).reshape(-1, 3).astype(int) - expected).max() <= 4


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    assert decode(encoded(GREEN, "JPEG", exif=exif), "x").size == (10, 20)


@pytest.mark.parametrize(
    "data",
    [b"", b"just text", encoded(GREEN, "JPEG")[:200], encoded(GREEN, "PNG")[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 50],
    ids=["empty", "text", "truncated jpeg", "truncated png", "damaged"],
)
def test_unusable_files_are_named(data: bytes):
    with pytest.raises(BadImage, match=r"photo\.jpg: "):
        decode(data, "photo.jpg")


def test_gigapixel_files_are_bounded_or_refused():
    huge = decode(encoded(Image.new("L", (30000, 14000)), "JPEG", quality=10), "huge.jpg")
    assert huge.size == (15000, 7000)  # decoded at a fraction, not in full
    assert huge.info["full_size"] == (30000, 14000)
    with pytest.raises(BadImage, match=r"huge\.png: too many pixels"):
        decode(encoded(Image.new("1", (30000, 14000)), "PNG"), "huge.png")


def numbers(values: list, kind: type, form: str = "TIFF", **options) -> bytes:
    """A row of `values` as a picture, each 4 pixels wide."""
    return encoded(Image.fromarray(np.repeat(np.array([values], kind), 4, 1)), form, **options)


def tiff(pixels: bytes, width: int, bits: int, kind: int = 1) -> bytes:
    """A TIFF of one row, of a depth that Pillow reads and does not write; `kind` is 1 for unsigned."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 134), (277, 1), (278, 1), (279, len(pixels))]
    entries = [np.array([tag, 3, 1, 0, value, 0], "<u2").tobytes() for tag, value in [*tags, (339, kind)]]
    return b"II*\0\x08\0\0\0" + np.array([len(entries)], "<u2").tobytes() + b"".join(entries) + bytes(4) + pixels


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (numbers([0, 2, 4], np.float32), [0, 127, 255]),
        (numbers([NAN, 2, 4], np.float32), [0, 127, 255]),
        (numbers([-INF, INF, 2, 4], np.float32), [0, 255, 127, 255]),
        (numbers([3.4e38, -3.4e38, 2, 4], np.float32), [255, 0, 127, 255]),
        (numbers([-9999, 2, 4], np.float32), [0, 127, 255]),
        (numbers([0, 0, 0], np.float32), [0, 0, 0]),
        (numbers([0, 100, 255], np.int32), [0, 100, 255]),
        (numbers([-1024, 1500, 3000], np.int32), [0, 127, 255]),
        (numbers([2**31 - 1, 500000, 1000000], np.int32), [255, 127, 255]),
        (numbers([30, 100, 200], np.uint32), [30, 100, 200]),
        (tiff(np.array([0, 2**31, 2**32 - 2], "<u4").tobytes(), 3, 32), [0, 127, 255]),
        (tiff(np.array([-1000, 1500, 3000], "<i2").tobytes(), 3, 16, 2), [0, 127, 255]),
        (numbers([0, 257 * 90, 65535], np.uint16), [0, 90, 255]),
        (numbers([0, 4096], np.uint16, "PNG"), [0, 15]),  # dark, as 16 bits say
        (numbers([0, 2048, 4095], np.uint16, "PNG"), [0, 127, 255]),
        (b"P5 3 1 4095\n" + np.array([0, 2048, 4095], ">u2").tobytes(), [0, 127, 255]),
    ],
    ids="float nan inf filler nodata zero int32 signed int-filler small-uint32 uint32 int16 16-bit dark-16-bit 12-in-16-bit 12-bit".split(),
)
def test_measured_pictures_keep_what_was_measured(data: bytes, expected: list[int]):
    row = np.asarray(decode(data, "x"))[0, :, 0]
    assert np.abs(row[:: len(row) // len(expected)].astype(int) - expected).max() <= 1


def test_12_bits_of_a_file_that_says_so():
    samples = np.unpackbits(np.array([0, 2048, 4095, 1024], ">u2").view(np.uint8).reshape(4, 2), axis=1)[:, 4:]
    data = tiff(np.packbits(samples).tobytes(), 4, 12)
    assert np.abs(np.asarray(decode(data, "x"))[0, :, 0].astype(int) - [0, 127, 255, 63]).max() <= 1


@pytest.mark.parametrize("values", [[NAN, NAN], [NAN, INF], [-3, -1], [-INF, NAN]])
def test_measured_pictures_that_would_be_black_are_named(values: list[float]):
    with pytest.raises(BadImage, match=r"m\.tif: no (finite values|values above 0)"):
        decode(numbers(values, np.float32), "m.tif")
    with pytest.raises(BadImage, match="no values above 0"):
        decode(numbers([-7, -2], np.int32), "m.tif")


def test_measured_pictures_are_turned_as_others():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(Image.fromarray(np.full((10, 20), 40000, np.uint16)), "PNG", exif=exif), "x")
    assert turned.size == (10, 20) and turned.info["full_size"] == (10, 20)


def test_bad_images_carry_name_and_reason_apart():
    for name in ("photo.jpg", "a: b: c.jpg"):
        with pytest.raises(BadImage) as caught:
            decode(b"", name)
        assert (caught.value.name, caught.value.reason) == (name, "empty file")
        assert str(caught.value) == f"{name}: empty file"
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.name, again.reason) == (name, "empty file")


def test_one_list_of_formats_and_none_that_runs_a_program():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif"} <= set(READABLE)
    assert not {".eps", ".pdf", ".ps", ".wmf", ".mpg", ".h5"} & set(READABLE)
    assert (".avif" in READABLE) == features.check("avif")
    for form in ("EPS", "PDF"):
        with pytest.raises(BadImage, match="not an image"):
            decode(encoded(GREEN, form), "x.jpg")


def test_missing_file_is_named():
    with pytest.raises(BadImage, match=r"nowhere\.jpg: No such file"):
        read_image("nowhere.jpg")


def test_splits_and_classes(photos: Path):
    train, val = open_split(photos, "train"), open_split(photos, "val")
    assert (len(train), len(val)) == (24, 8)
    assert train.classes == ["blue_thing", "red_thing"] and train.names == ["blue thing", "red thing"]
    assert sorted(set(train.targets)) == [0, 1]
    assert np.asarray(val.read(0).image)[..., 2].mean() > 150
    assert open_evaluation(photos).files == val.files


def test_split_is_made_where_there_is_none(photos: Path):
    train, val = open_split(photos / "train", "train"), open_split(photos / "train", "val")
    assert len(train) + len(val) == 24
    assert not set(train.files) & set(val.files)
    assert open_split(photos / "train", "train").files == train.files
    assert len(open_evaluation(photos / "train")) == 24


def test_tar_is_the_same_as_its_folder(photos: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname="photos")
    packed, folder = open_split(tmp_path / "photos.tar", "val"), open_split(photos, "val")
    assert packed.targets == folder.targets and packed.classes == folder.classes
    assert [packed.read(i).image.tobytes() for i in range(8)] == [folder.read(i).image.tobytes() for i in range(8)]


def test_useless_folders_say_why(photos: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        open_split(tmp_path / "none", "train")
    with pytest.raises(UserError, match="no images"):
        open_split(tmp_path, "train")
    one = tmp_path / "one"
    (one / "train").mkdir(parents=True)
    (one / "train" / "red").symlink_to(photos / "train" / "red_thing")
    with pytest.raises(UserError, match="single class"):
        open_split(one, "train")
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(UserError, match="neither a folder nor an uncompressed tar"):
        scan_folders(str(tmp_path / "x.tar"))


def test_imagenet_ids_become_words():
    assert readable_names(["n01440764", "n03028079"]) == ["tench", "church"]
    assert readable_names(["red_thing"]) == ["red thing"]


def test_randaugment_survives_its_largest_magnitude():
    """At magnitude 10 timm asks to keep 0 bits of a colour, which newer versions of Pillow refuse."""
    preparation = Preparation(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    transform = training_transform(Augmentation(auto_augment="rand-m10-inc1"), 32, preparation)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for _ in range(120):  # one of fifteen operations, two at a time
        assert transform(picture).shape == (3, 32, 32)
