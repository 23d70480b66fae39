"""Maps of classes from masks: as data sets have them and as annotation tools write them; read right, or refused by file."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import mistake, output
from PIL import Image

from glmix.data.check import check_maps
from glmix.data.images import BadImage
from glmix.data.masks import IGNORED, ade_classes, open_maps
from glmix.data.samples import DataSet
from glmix.data.scenes import CLASSES, make_scene
from glmix.errors import UserError

VALUES = np.array([[0, 1, 2, 255, 0, 1], [2, 2, 1, 1, 0, 0], [0, 0, 0, 0, 1, 2], [255, 1, 1, 2, 2, 0]], np.uint8)
SOLID = np.where(VALUES == IGNORED, 0, VALUES)
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [10, 20, 30]], np.uint8)
NAMES = "ground\nroad\ntree\n"
TABLE = "name,r,g,b\nground,0,0,0\nroad,255,0,0\ntree,10,20,30\n"


def picture(path: Path, size: tuple[int, int] = (6, 4), orientation: int = 1) -> None:
    """A grey picture of width and height as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "grey")
    exif = Image.Exif()
    if orientation > 1:
        exif[274] = orientation
    image.save(path, exif=exif)


def mask(path: Path, values: Any = VALUES, palette: Sequence[int] | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))
    if palette is not None:
        image.putpalette([*palette, *[77] * (768 - len(palette))])  # whole: Pillow stores few colours in few bits
    image.save(path, **options)


def pair(
    root: Path, values: Any = VALUES, name: str = "a", palette: Sequence[int] | None = None, **options: Any
) -> Path:
    """A picture and its mask, in images/ and masks/."""
    picture(root / "images" / f"{name}.jpg")
    mask(root / "masks" / f"{name}.png", values, palette, **options)
    return root


def listed(root: Path, text: str = NAMES, file: str = "classes.txt") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)
    return root


def only(root: Path) -> Any:
    """The one map of a data set."""
    found = open_maps(str(root))
    assert len(found.whole) == 1, found
    return found.whole.targets[0]


def refused(root: Path) -> str:
    with pytest.raises(UserError) as error:
        open_maps(str(root))
    return str(error.value)


def said(data: DataSet) -> str:
    return "\n".join(map(str, data.left_out))


# --- layouts


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        ("images/{}/a.jpg", "masks/{}/a.png"),
        ("{}/images/a.jpg", "{}/masks/a.png"),
        ("images/{}/a.jpg", "annotations/{}/a.png"),
        ("{}/images/a.jpg", "{}/labels/a.png"),
        ("{}/a.jpg", "{}annot/a.png"),
        ("{}/a.jpg", "{}_labels/a_L.png"),
        ("{}/a.jpg", "{}/a_mask.png"),
        ("{}/a.jpg", "{}/a.png"),
        ("{}/a_sat.jpg", "{}/a_mask.png"),
        ("{}_images/a.JPG", "{}_masks/a_mask.png"),
        ("wrapper/{}/img/a.jpg", "wrapper/{}/ann/a.jpg.png"),
        ("images/{}/city/a.jpg", "gt/{}/city/a.png"),
    ],
)
def test_layouts(tmp_path: Path, pictures: str, masks: str):
    """Both splits, with masks that differ, from a folder and from a tar of it."""
    root = tmp_path / "data"
    for split, values in (("train", SOLID), ("val", SOLID[::-1])):
        picture(root / pictures.format(split))
        mask(root / masks.format(split), values)
    listed(root)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(root, "data")
    digests = []
    for name in (root, tmp_path / "data.tar"):
        data = open_maps(str(name))
        assert data.whole.classes == ["ground", "road", "tree"] and not data.left_out
        assert {split: len(found) for split, found in data.named.items()} == {"train": 1, "val": 1}
        np.testing.assert_array_equal(data.split("train").targets[0], SOLID)
        np.testing.assert_array_equal(data.split("val").read(0).target, SOLID[::-1])
        assert data.split("val").targets[0].dtype == np.uint8
        digests.append(data.whole.digest())
    assert digests[0] == digests[1]


def test_camvid(tmp_path: Path):
    """Names with numbers and colours; what is called unlabelled is ignored; a palette of the same colours."""
    listed(tmp_path, "0 Sky 128 128 128\n1 Road 128 64 128\n2 Unlabelled 0 0 0\n")
    for split in ("train", "val", "test"):
        picture(tmp_path / split / "x.jpg")
        mask(tmp_path / f"{split}annot" / "x.png", SOLID, [128, 128, 128, 128, 64, 128, 0, 0, 0])
    data = open_maps(str(tmp_path))
    assert data.whole.classes == ["Sky", "Road"] and data.least_classes == 1
    np.testing.assert_array_equal(data.split("val").targets[0], np.where(SOLID == 2, IGNORED, SOLID))
    assert "Unlabelled: no class" in said(data) and "test/x.jpg: of no split that is used" in said(data)


def test_ade20k(tmp_path: Path):
    """0 is ignored and the rest less one, by its list of objects; without that by its 150 numbers."""
    values = np.array([[0, 1, 2], [150, 149, 0]], np.uint8)
    for split in ("training", "validation"):
        picture(tmp_path / "images" / split / "ADE_1.jpg", (3, 2))
        mask(tmp_path / "annotations" / split / "ADE_1.png", values)
    wanted = [[255, 0, 1], [149, 148, 255]]
    data = open_maps(str(tmp_path))
    assert data.whole.classes == [str(n) for n in range(1, 151)]
    np.testing.assert_array_equal(data.split("val").targets[0], wanted)
    rows = [f"{n}\t0.1\t10\t10\t1\tthing {n}, other" for n in range(1, 151)]
    listed(tmp_path, "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]), "objectInfo150.txt")
    data = open_maps(str(tmp_path))
    assert data.whole.classes[:2] == ["thing 1, other", "thing 2, other"] and len(data.whole.classes) == 150
    np.testing.assert_array_equal(data.split("train").targets[0], wanted)
    assert ade_classes(None).values()[0] == IGNORED


def test_voc(tmp_path: Path):
    """Splits by lists; masks of instances and pictures without masks are left out; 255 is ignored; its own names."""
    for name in "abc":
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
    for name in "ab":
        mask(tmp_path / "SegmentationClass" / f"{name}.png", VALUES, [0, 0, 0, 128, 0, 0, 0, 128, 0])
        mask(tmp_path / "SegmentationObject" / f"{name}.png", VALUES)
        listed(
            tmp_path / "Annotations", "<annotation><object><name>bicycle</name></object></annotation>", f"{name}.xml"
        )
    listed(tmp_path / "ImageSets" / "Main", "a\nc\nb\n", "train.txt")
    for split, name in (("train", "a"), ("val", "b"), ("trainval", "a\nb")):
        listed(tmp_path / "ImageSets" / "Segmentation", f"{name}\n", f"{split}.txt")
    data = open_maps(str(tmp_path))
    assert data.whole.classes[:3] == ["background", "aeroplane", "bicycle"] and len(data.whole.classes) == 21
    assert data.split("train").files == ["JPEGImages/a.jpg"] and data.split("val").files == ["JPEGImages/b.jpg"]
    np.testing.assert_array_equal(data.whole.targets[0], VALUES)
    assert "JPEGImages/c.jpg: image without a mask" in said(data)
    assert "SegmentationObject/a.png" in said(data)
    listed(tmp_path / "Annotations", "<annotation><object><name>nut</name></object></annotation>", "b.xml")
    assert open_maps(str(tmp_path)).whole.classes == ["0", "1", "2"]  # somebody's own classes: not VOC's names


def test_scenes():
    data = open_maps("scenes")
    assert data.whole.classes == ["background", *CLASSES]
    sample = data.split("val").read(3)
    scene = make_scene(1, 3)
    np.testing.assert_array_equal(sample.target, scene.semantic)
    np.testing.assert_array_equal(np.asarray(sample.image), scene.image)


def test_one_picture_in_two_lists(tmp_path: Path):
    pair(listed(tmp_path))
    for split in ("train", "val"):
        listed(tmp_path / "lists", "images/a.jpg masks/a.png\n", f"{split}.txt")
    assert "images/a.jpg is in lists/val.txt and in lists/train.txt" in refused(tmp_path)


def test_a_list_of_what_is_held_out_is_enough(tmp_path: Path):
    for name in "abc":
        pair(listed(tmp_path), name=name)
    listed(tmp_path, "b.jpg\n", "valid.txt")
    data = open_maps(str(tmp_path))
    assert data.split("train").files == ["images/a.jpg", "images/c.jpg"] and data.split("val").files == ["images/b.jpg"]


def test_names_differ_in_case_and_unicode_form(tmp_path: Path):
    picture(tmp_path / "images" / "Caf\u00e9.JPG")
    mask(tmp_path / "masks" / "cafe\u0301.png", SOLID)
    np.testing.assert_array_equal(only(listed(tmp_path)), SOLID)


def test_names_that_differ_in_case_alone_stay_apart(tmp_path: Path):
    pair(listed(tmp_path), SOLID, "a")
    pair(tmp_path, SOLID[::-1], "A")
    whole = open_maps(str(tmp_path)).whole
    np.testing.assert_array_equal(whole.targets[whole.files.index("images/A.jpg")], SOLID[::-1])


def test_what_has_no_partner_is_named(tmp_path: Path):
    pair(listed(tmp_path))
    picture(tmp_path / "images" / "b.jpg")
    mask(tmp_path / "masks" / "c.png")
    (tmp_path / "masks" / "d.npy").write_bytes(b"")
    data = open_maps(str(tmp_path))
    assert len(data.whole) == 1
    for text in ("images/b.jpg: image without a mask", "masks/c.png: mask without an image", "masks/d.npy: array"):
        assert text in said(data)


def test_two_masks_of_a_picture_or_none_at_all(tmp_path: Path):
    pair(listed(tmp_path))
    mask(tmp_path / "labels" / "a.png")
    assert "images/a.jpg has two masks, labels/a.png and masks/a.png" in refused(tmp_path)
    picture(tmp_path / "photos" / "images" / "a.jpg")
    assert "no image with a mask" in refused(tmp_path / "photos")
    assert "no such folder or tar" in refused(tmp_path / "nothing")


# --- lists of classes


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", NAMES),
        ("classes.txt", "\ufeff0 ground\n2: tree\n1\troad\n"),
        ("labels.txt", "__ignore__\nground\nroad\ntree\n"),
        ("class_names.txt", "0,ground\n1,road\n2,tree\n255,void\n"),
        ("labels.json", '["ground", "road", "tree"]'),
        ("labels.json", '{"0": "ground", "1": "road", "2": "tree"}'),
        ("labels.json", '{"ground": 0, "road": 1, "tree": 2}'),
        ("labels.json", '[{"name": "ground", "color": "#000000"}, {"name": "road"}, {"name": "tree"}]'),
        ("labels.json", '[{"id": 1, "name": "road"}, {"id": 0, "name": "ground"}, {"id": 2, "name": "tree"}]'),
        ("classes.csv", "name,code\nroad,1\nground,0\ntree,2\n"),
        ("classes.csv", "label_id,name\n1,road\n0,ground\n2,tree\n"),
        ("train/_classes.csv", "Pixel Value, Class\n0, ground\n1, road\n2, tree\n"),
    ],
)
def test_lists_of_classes(tmp_path: Path, file: str, text: str):
    pair(tmp_path)
    listed((tmp_path / file).parent, text, Path(file).name)
    data = open_maps(str(tmp_path))
    assert data.whole.classes == ["ground", "road", "tree"]
    np.testing.assert_array_equal(data.whole.targets[0], VALUES)


def test_names_of_several_words_and_numbers_with_gaps(tmp_path: Path):
    values = np.array([[7, 40, 7], [40, 9, 255]], np.uint8)
    picture(tmp_path / "images" / "a.jpg", (3, 2))
    mask(tmp_path / "masks" / "a.png", values)
    listed(tmp_path, "7 traffic light\n40 person\n9 void\n")
    data = open_maps(str(tmp_path))
    assert data.whole.classes == ["traffic light", "person"]
    np.testing.assert_array_equal(data.whole.targets[0], [[0, 1, 0], [1, 255, 255]])


def test_numbers_found_are_the_classes_where_nothing_names_them(tmp_path: Path):
    pair(tmp_path, np.where(VALUES == 1, 5, VALUES).astype(np.uint8))
    data = open_maps(str(tmp_path))
    assert data.whole.classes == ["0", "2", "5"] and "0, 2, 5: no list of classes" in said(data)
    np.testing.assert_array_equal(data.whole.targets[0], np.array([0, 2, 1, 255], np.uint8)[np.minimum(VALUES, 3)])


def test_a_background_that_is_no_class_must_be_told(tmp_path: Path):
    pair(listed(tmp_path, "1 road\n2 tree\n"))
    assert "masks/a.png: the mask has the number 0" in refused(tmp_path) and "0 void" in refused(tmp_path)
    listed(tmp_path, "0 void\n1 road\n2 tree\n")
    data = open_maps(str(tmp_path))
    assert data.whole.classes == ["road", "tree"]
    np.testing.assert_array_equal(data.whole.targets[0], np.array([255, 0, 1, 255], np.uint8)[np.minimum(VALUES, 3)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no class"),
        ("road\nroad\n", "road is there twice"),
        ("1 road\n1 tree\n", "road and tree have the same value, 1"),
        ("road 1 2 3\ntree 1 2 3\n", "road and tree have the same colour"),
        ("road 1 2 300\ntree 1 2 3\n", "colour of road"),
        ("\n".join(f"c{i}" for i in range(300)), "300 classes"),
    ],
)
def test_lists_that_cannot_be_right(tmp_path: Path, text: str, words: str):
    pair(listed(tmp_path, text))
    assert words in refused(tmp_path) and "classes.txt" in refused(tmp_path)


def test_numbers_that_nothing_explains_are_refused(tmp_path: Path):
    pair(listed(tmp_path / "table", "name,weight\nroad,1\nground,0\ntree,2\n", "classes.csv"))
    assert "classes.csv: weight holds numbers" in refused(tmp_path / "table")
    pair(listed(tmp_path / "json", '[{"name": "road", "weight": 1}, {"name": "ground", "weight": 0}]', "labels.json"))
    assert "weight of road is a number" in refused(tmp_path / "json")


def test_lists_of_splits_with_spaces_in_their_names(tmp_path: Path):
    for name in ("my photo 1", "b"):
        pair(listed(tmp_path), SOLID, name)
    (tmp_path / "train.txt").write_text("my photo 1.jpg\n")
    (tmp_path / "val.txt").write_text("b 1\n")
    assert open_maps(str(tmp_path)).split("train").files == ["images/my photo 1.jpg"]


def test_lists_that_differ(tmp_path: Path):
    pair(listed(tmp_path))
    listed(tmp_path, '["ground", "tree", "road"]', "labels.json")
    assert "classes.txt and labels.json list other classes" in refused(tmp_path)


# --- colours


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("class_dict.csv", TABLE),
        ("class_dict.csv", TABLE.replace(",", ";").replace("name", " Name")),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nground:0,0,0::\nroad:255,0,0::\ntree:10,20,30::\n"),
        ("label_colors.txt", "0 0 0\tground\n255 0 0\troad\n10 20 30\ttree\n"),
        ("classes.txt", "ground 0 0 0\nroad 255 0 0\ntree 10 20 30\n"),
    ],
)
def test_a_table_tells_colours(tmp_path: Path, file: str, text: str):
    pair(listed(tmp_path, text, file), COLOURS[SOLID])
    assert open_maps(str(tmp_path)).whole.classes == ["ground", "road", "tree"]
    np.testing.assert_array_equal(only(tmp_path), SOLID)


def test_a_palette_has_the_colours_of_the_table_in_any_order(tmp_path: Path):
    palette = [10, 20, 30, 0, 0, 0, 255, 0, 0]  # the table's third, first, second
    pair(listed(tmp_path, TABLE, "class_dict.csv"), VALUES, palette=palette)
    np.testing.assert_array_equal(only(tmp_path), np.array([2, 0, 1, 255], np.uint8)[np.minimum(VALUES, 3)])


def test_colours_without_a_table_or_outside_it(tmp_path: Path):
    pair(tmp_path / "none", COLOURS[SOLID])
    pair(listed(tmp_path / "names"), COLOURS[SOLID])
    for name in ("none", "names"):
        assert "masks/a.png: a mask in colours" in refused(tmp_path / name)
        assert "class_dict.csv" in refused(tmp_path / name)
    pair(listed(tmp_path / "other", TABLE, "class_dict.csv"), (COLOURS + np.array([0, 0, 5], np.uint8))[SOLID])
    assert "masks/a.png" in refused(tmp_path / "other") and "0,0,5" in refused(tmp_path / "other")


def test_grey_saved_as_rgb_is_numbers(tmp_path: Path):
    pair(listed(tmp_path), np.stack([VALUES] * 3, -1))
    np.testing.assert_array_equal(only(tmp_path), VALUES)


def test_palettes_that_do_not_agree(tmp_path: Path):
    """As programs write that save colours with as few as there are: the same number is another class in another file."""
    pair(listed(tmp_path), SOLID, "a", palette=[0, 0, 0, 255, 0, 0, 0, 255, 0])
    pair(tmp_path, SOLID, "b", palette=[255, 0, 0, 0, 0, 0, 0, 255, 0])
    assert "masks/b.png: number 0 is 255,0,0" in refused(tmp_path)


# --- files as tools write them


def test_masks_as_jpeg_are_refused(tmp_path: Path):
    picture(listed(tmp_path) / "images" / "a.jpg")
    mask(tmp_path / "masks" / "a.jpg", SOLID, quality=100)
    assert "masks/a.jpg: a mask as JPEG" in refused(tmp_path) and "PNG" in refused(tmp_path)
    (tmp_path / "masks" / "a.jpg").rename(tmp_path / "masks" / "a.png")  # by what is in it, not by its name
    assert "masks/a.png: a mask as JPEG" in refused(tmp_path)


def with_alpha(alpha: Any, rgb: Any = COLOURS[SOLID]) -> Any:
    return np.concatenate([rgb, np.asarray(alpha, np.uint8)[..., None]], -1)


def test_alpha(tmp_path: Path):
    table = ("class_dict.csv", TABLE)
    pair(listed(tmp_path / "full", table[1], table[0]), with_alpha(np.full((4, 6), 255)))
    pair(listed(tmp_path / "clear", table[1], table[0]), with_alpha(np.where(SOLID, 255, 0)))
    for name in ("full", "clear"):  # what is transparent is stored black, as the ground is
        np.testing.assert_array_equal(only(tmp_path / name), SOLID)
    pair(listed(tmp_path / "soft", table[1], table[0]), with_alpha(np.full((4, 6), 100)))
    assert "masks/a.png: a mask that is partly transparent" in refused(tmp_path / "soft")
    pair(listed(tmp_path / "hidden", table[1], table[0]), with_alpha(np.zeros((4, 6))))
    assert "masks/a.png: a mask with colours where it is transparent" in refused(tmp_path / "hidden")
    alone = np.concatenate([np.zeros((4, 6, 3), np.uint8), np.where(SOLID, 255, 0).astype(np.uint8)[..., None]], -1)
    pair(listed(tmp_path / "alone", table[1], table[0]), alone)
    assert "masks/a.png: a mask that says nothing but by its alpha channel" in refused(tmp_path / "alone")


def test_16_bits(tmp_path: Path):
    pair(listed(tmp_path, "0 ground\n1 road\n1000 tree\n"), np.where(SOLID == 2, 1000, SOLID.astype(np.uint16)))
    np.testing.assert_array_equal(only(tmp_path), SOLID)
    pair(listed(tmp_path / "beyond"), np.where(SOLID == 2, 1000, SOLID.astype(np.uint16)))
    assert "masks/a.png: the mask has the number 1000, which is none of the 3 classes" in refused(tmp_path / "beyond")


def test_one_bit_and_few_bits(tmp_path: Path):
    pair(listed(tmp_path / "one", "ground\nroad\n"), Image.fromarray(SOLID > 0))
    np.testing.assert_array_equal(only(tmp_path / "one"), SOLID > 0)
    pair(listed(tmp_path / "four"), SOLID, palette=[0, 0, 0, 1, 1, 1, 2, 2, 2], bits=4)
    np.testing.assert_array_equal(only(tmp_path / "four"), SOLID)


def test_0_and_255_alone(tmp_path: Path):
    """Read as two classes where two are listed; refused where 255 may be what is ignored."""
    binary = np.where(SOLID > 0, 255, 0).astype(np.uint8)
    pair(listed(tmp_path / "two", "ground\nroad\n"), binary)
    np.testing.assert_array_equal(only(tmp_path / "two"), SOLID > 0)
    pair(listed(tmp_path / "three"), binary)
    pair(tmp_path / "none", binary)
    for name in ("three", "none"):
        assert "hold 0 and 255 alone (first: masks/a.png)" in refused(tmp_path / name)
    pair(listed(tmp_path / "table", "name,r,g,b\nground,0,0,0\nroad,255,255,255\n", "class_dict.csv"), binary)
    np.testing.assert_array_equal(only(tmp_path / "table"), SOLID > 0)
    pair(listed(tmp_path / "mixed", "ground\nroad\n"), binary, "a")
    pair(tmp_path / "mixed", np.where(SOLID > 0, 1, 0).astype(np.uint8), "b")
    np.testing.assert_array_equal(
        open_maps(str(tmp_path / "mixed")).whole.targets[0], binary
    )  # ignored, as the rule is


def test_smoothed_edges_are_refused(tmp_path: Path):
    pair(listed(tmp_path / "two", "ground\nroad\n"), np.array([[0, 255, 130, 0, 0, 0]] * 4, np.uint8))
    assert "masks/a.png: the mask has the number 130" in refused(tmp_path / "two")
    picture(tmp_path / "none" / "images" / "a.jpg", (256, 2))
    mask(tmp_path / "none" / "masks" / "a.png", np.arange(512, dtype=np.uint8).reshape(2, 256))
    assert "smoothed edges" in refused(tmp_path / "none") and "masks/a.png" in refused(tmp_path / "none")


def test_numbers_beyond_the_list(tmp_path: Path):
    pair(listed(tmp_path, "ground\nroad\n"))
    assert "masks/a.png: the mask has the number 2, which is none of the 2 classes of classes.txt" in refused(tmp_path)


def test_masks_of_another_size(tmp_path: Path):
    pair(listed(tmp_path), SOLID[:3])
    assert "masks/a.png: a mask of 6 x 3 pixels; images/a.jpg is of 6 x 4" in refused(tmp_path)


# --- photos that are turned


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_of_turned_photos_in_either_frame(tmp_path: Path, orientation: int):
    """A mark in the photo's corner is under the same mark of the mask, whichever way the mask was drawn."""
    stored = np.zeros((32, 48), np.uint8)
    stored[:16, :16] = 1
    exif = Image.Exif()
    exif[274] = orientation
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(255 * stored).convert("RGB").save(tmp_path / "images" / f"{name}.jpg", exif=exif, quality=95)
    listed(tmp_path, "ground\nmark\n")
    mask(tmp_path / "masks" / "a.png", stored)
    sample = open_maps(str(tmp_path)).whole.read(0)
    assert sample.target.shape == (48, 32)
    np.testing.assert_array_equal(sample.target, np.asarray(sample.image)[..., 0] > 128)
    mask(tmp_path / "masks" / "b.png", sample.target)
    np.testing.assert_array_equal(open_maps(str(tmp_path)).whole.targets[1], sample.target)


def test_turned_photos_whose_size_tells_nothing(tmp_path: Path):
    picture(tmp_path / "images" / "a.jpg", orientation=3)
    mask(listed(tmp_path) / "masks" / "a.png", SOLID)
    assert "masks/a.png: images/a.jpg is turned by EXIF (orientation 3)" in refused(tmp_path)
    exif = Image.Exif()
    exif[274] = 3
    mask(tmp_path / "masks" / "a.png", SOLID, exif=exif)  # which tells it
    np.testing.assert_array_equal(only(tmp_path), SOLID[::-1, ::-1])


# --- the check of all


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """40 good pairs, of which some are made bad that the first look does not see: its numbers are told by the test."""
    for i in range(40):
        pair(listed(tmp_path), name=f"{i:02}")
    looked_at = {(2 * i + 1) * 40 // 64 for i in range(32)}
    a, b, c, d = sorted(set(range(40)) - looked_at)[:4]
    mask(tmp_path / "masks" / f"{a:02}.png", SOLID[:2])
    mask(tmp_path / "masks" / f"{b:02}.png", SOLID + 7)
    (tmp_path / "images" / f"{c:02}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "masks" / f"{d:02}.png").write_bytes((tmp_path / "masks" / "00.png").read_bytes()[:60])
    listed(tmp_path, f"{a}\n{b}\n{c}\n{d}\n", "bad.md")
    return tmp_path


def test_all_is_checked(flawed: Path, capsys: pytest.CaptureFixture):
    a, b, c, d = (int(n) for n in (flawed / "bad.md").read_text().split())
    whole = open_maps(str(flawed)).whole
    problems = check_maps(whole).unusable
    assert [Path(found.name).name for found in problems] == [f"{a:02}.png", f"{b:02}.png", f"{c:02}.jpg", f"{d:02}.png"]
    assert "6 x 2" in problems[0].reason and "number 7" in problems[1].reason
    with pytest.raises(BadImage, match=f"masks/{a:02}.png"):
        whole.read(a)
    line = mistake(capsys, "check-data", "--data", flawed, "--task", "segment")
    assert "4 of 40 images cannot be used" in line and f"masks/{a:02}.png" in line


def test_what_is_well_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture):
    pair(listed(tmp_path))
    assert check_maps(open_maps(str(tmp_path)).whole).unusable == []
    picture(tmp_path / "images" / "b.jpg")
    printed = output(capsys, "check-data", "--data", tmp_path, "--task", "segment")
    assert "1 images, 3 classes" in printed and "not used: images/b.jpg: image without a mask" in printed


def test_masks_that_hold_the_first_class_alone(tmp_path: Path):
    pair(listed(tmp_path, "ground\nroad\n"), np.where(SOLID > 0, 255, 0).astype(np.uint8), "a")
    pair(tmp_path, SOLID > 1, "b")  # of one bit
    whole = open_maps(str(tmp_path)).whole
    assert check_maps(whole).unusable == []
    assert "is 255 a class?" in check_maps(whole.take([0])).unusable[0].reason


def test_a_mask_of_another_split_is_not_taken(tmp_path: Path):
    listed(tmp_path)
    for split, name in (("train", "a"), ("val", "b")):
        picture(tmp_path / "images" / split / f"{name}.jpg")
        mask(tmp_path / "masks" / split / f"{name}.png")
    picture(tmp_path / "images" / "train" / "c.jpg")
    mask(tmp_path / "masks" / "val" / "c.png")
    data = open_maps(str(tmp_path))
    assert data.split("train").files == ["images/train/a.jpg"]
    assert "images/train/c.jpg: image without a mask" in said(data)
    assert "masks/val/c.png: mask without an image" in said(data)


def test_a_number_beyond_the_palette(tmp_path: Path):
    """Programs fill palettes up with black, and black may be a class."""
    colours = [10, 20, 30, 255, 0, 0]
    listed(tmp_path, "name,r,g,b\nsky,10,20,30\nroad,255,0,0\nground,0,0,0\n", "class_dict.csv")
    for name, values in (("a", SOLID % 2), ("b", np.where(SOLID == 2, 42, 0))):
        picture(tmp_path / "images" / f"{name}.jpg")
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(colours + [0] * (768 - len(colours)))
        mask(tmp_path / "masks" / f"{name}.png", image)
    assert "masks/b.png: number 42 has the colour of a lower number in the mask's palette (0,0,0)" in refused(tmp_path)


def test_masks_of_255_alone(tmp_path: Path):
    pair(listed(tmp_path, "ground\nroad\n"), np.full((4, 6), 255, np.uint8))
    assert "masks hold 255 alone (first: masks/a.png)" in refused(tmp_path)


def test_what_looks_odd_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A mask of 0 and 255 among those of 0 and 1, and a class that no mask has."""
    listed(tmp_path / "two", "ground\nroad\n")
    pair(tmp_path / "two", (SOLID > 0).astype(np.uint8), "a")
    pair(tmp_path / "two", np.where(SOLID > 0, 255, 0).astype(np.uint8), "b")
    printed = output(capsys, "check-data", "--data", tmp_path / "two", "--task", "segment")
    assert "note: images/b.jpg: 1 of 2 masks hold nothing but ground and what is ignored; is 255 road there?" in printed
    pair(listed(tmp_path / "three"), (SOLID > 0).astype(np.uint8))
    printed = output(capsys, "check-data", "--data", tmp_path / "three", "--task", "segment")
    assert "note: class tree: not in any image" in printed


def test_the_digest_tells_other_masks(tmp_path: Path):
    pair(listed(tmp_path))
    before = open_maps(str(tmp_path)).whole.digest()
    assert open_maps(str(tmp_path)).whole.digest() == before
    pair(tmp_path, np.zeros((4, 6), np.uint8))
    assert open_maps(str(tmp_path)).whole.digest() != before
