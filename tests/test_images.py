"""Any image file becomes RGB or a named reason; folders and tars become labelled sets."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glmix import UserError
from glmix.data.images import BadImage, decode, load_evaluation, load_split, read_image, readable_names
from glmix.data.transforms import training_transform
from glmix.options import TrainOptions


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


def test_missing_file_is_named():
    with pytest.raises(BadImage, match=r"nowhere\.jpg: No such file"):
        read_image("nowhere.jpg")


def test_splits_and_classes(photos: Path):
    train, val = load_split(photos, "train"), load_split(photos, "val")
    assert (len(train), len(val)) == (24, 8)
    assert train.classes == ["blue_thing", "red_thing"] and train.names == ["blue thing", "red thing"]
    assert sorted(set(train.labels)) == [0, 1]
    assert np.asarray(val.read(0))[..., 2].mean() > 150
    assert load_evaluation(photos).files == val.files


def test_split_is_made_where_there_is_none(photos: Path):
    train, val = load_split(photos / "train", "train"), load_split(photos / "train", "val")
    assert len(train) + len(val) == 24
    assert not set(train.files) & set(val.files)
    assert load_split(photos / "train", "train").files == train.files
    assert len(load_evaluation(photos / "train")) == 24


def test_tar_is_the_same_as_its_folder(photos: Path, tmp_path: Path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname="photos")
    packed, folder = load_split(tmp_path / "photos.tar", "val"), load_split(photos, "val")
    assert packed.labels == folder.labels and packed.classes == folder.classes
    assert [packed.read(i).tobytes() for i in range(8)] == [folder.read(i).tobytes() for i in range(8)]


def test_useless_folders_say_why(photos: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        load_split(tmp_path / "none", "train")
    with pytest.raises(UserError, match="no images"):
        load_split(tmp_path, "train")
    one = tmp_path / "one"
    (one / "train").mkdir(parents=True)
    (one / "train" / "red").symlink_to(photos / "train" / "red_thing")
    with pytest.raises(UserError, match="single class"):
        load_split(one, "train")
    (tmp_path / "x.tar").write_text("no tar")
    with pytest.raises(UserError, match="neither a folder nor an uncompressed tar"):
        load_split(tmp_path / "x.tar", "train")


def test_imagenet_ids_become_words():
    assert readable_names(["n01440764", "n03028079"]) == ["tench", "church"]
    assert readable_names(["red_thing"]) == ["red thing"]


def test_randaugment_survives_its_largest_magnitude():
    """At magnitude 10 timm asks to keep 0 bits of a colour, which newer versions of Pillow refuse."""
    options = TrainOptions(image_size=32, auto_augment="rand-m10-inc1")
    cfg = {"interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    transform = training_transform(options, cfg)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    for _ in range(120):  # one of fifteen operations, two at a time
        assert transform(picture).shape == (3, 32, 32)
