"""Data with objects as annotation tools write it: each thing read right, or refused with file and id."""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import output
from objects import coco, rectangle, scene, write_json, write_split
from PIL import Image, ImageOps

from glmix.data.coco import segmentation_of
from glmix.data.detection import open_objects
from glmix.data.images import BadImage
from glmix.data.objects import encoded, run_counts
from glmix.data.samples import DataSet
from glmix.errors import UserError

IDS = {"red": 3, "blue": 7}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, "train", 3, 0, IDS)
    write_split(tmp_path, "val", 2, 10, IDS)
    return tmp_path


def single(root: Path, annotation: dict[str, Any], picture: dict[str, Any] | None = None, **more: Any) -> DataSet:
    """Data of one picture with one object, and what is changed of it."""
    image, _ = scene(0)
    image.save(root / "0.png")
    content = coco([[("red", [10, 12, 30, 32])]], IDS)
    content["annotations"][0].update(annotation)
    content["images"][0].update(picture or {})
    for part in ("annotations", "images"):
        content[part] = [{k: v for k, v in each.items() if v is not Ellipsis} for each in content[part]]
    write_json(root, "instances.json", content | more)
    return open_objects(root)


def said(data: DataSet) -> str:
    return "; ".join(map(str, data.left_out))


def test_splits_classes_and_ids(root: Path):
    data = open_objects(root)
    assert data.whole.classes == ["red", "blue"] and data.whole.info == {"category_ids": [3, 7]}
    assert {name: len(places) for name, places in data.named.items()} == {"train": 3, "val": 2}
    sample = data.split("val").read(1)
    _, wanted = scene(11)
    assert sample.target.boxes.tolist() == [box for _, box in wanted]
    assert [data.whole.classes[i] for i in sample.target.labels] == [kind for kind, _ in wanted]


def test_categories_go_by_their_names(root: Path):
    content = write_split(root, "other", 2, 10, {"blue": 1, "red": 2})
    write_json(root, "instances_val.json", content)
    (root / "annotations" / "instances_other.json").unlink()
    val = open_objects(root).split("val")
    assert [val.classes[i] for i in val.read(0).target.labels] == [kind for kind, _ in scene(10)[1]]


def test_a_class_that_training_does_not_have(root: Path):
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    content["categories"].append({"id": 9, "name": "green"})
    write_json(root, "instances_val.json", content)
    assert open_objects(root).whole.classes == ["red", "blue"]  # no object is of it
    content["annotations"][1]["category_id"] = 9
    write_json(root, "instances_val.json", content)
    with pytest.raises(UserError, match=r"instances_val.json: annotation 2 is of class 'green'"):
        open_objects(root)


@pytest.mark.parametrize(("change", "words"), [
    ({"category_id": 5}, "annotation 1 has category_id 5, which is not among the categories"),
    ({"image_id": 8}, "without any object; left out .*annotation 1: of an image that is not in the file"),
    ({"bbox": [10, 12, 0, 5]}, "annotation 1: box without area"),
    ({"bbox": [90, 12, 10, 5]}, "annotation 1: box outside its picture"),
    ({"bbox": [10, 12, float("nan"), 5]}, "annotation 1: box that is not four numbers"),
    ({"bbox": [10, 12, 5]}, "annotation 1: box that is not four numbers"),
    ({"segmentation": {"size": [48, 64], "counts": [5, 7]}}, "annotation 1: mask whose run lengths do not fill"),
    ({"segmentation": {"size": [64, 48], "counts": [3072]}}, "annotation 1: mask of another size than its image"),
])  # fmt: skip
def test_refused_by_id(change: dict[str, Any], words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        single(tmp_path, change)


def test_ids_may_start_at_0_and_keys_be_missing(tmp_path: Path):
    data = single(tmp_path, {"id": 0, "area": ..., "iscrowd": ...})
    objects = data.whole.read(0).target
    assert (objects.areas.tolist(), objects.crowd.tolist()) == ([400.0], [False])
    assert single(tmp_path, {"area": 123.5}).whole.read(0).target.areas.tolist() == [123.5]
    assert single(tmp_path, {"iscrowd": 1, "image_id": 0}, categories=[{"id": 3, "name": "red"}],
                  annotations=[{"id": 0, "image_id": 0, "category_id": 3, "bbox": [1, 1, 9, 9], "iscrowd": c} for c in (0, 1)],
                  ).whole.read(0).target.crowd.tolist() == [False, True]  # fmt: skip


def test_a_box_from_its_mask(tmp_path: Path):
    assert single(tmp_path, {"bbox": ...}).whole.read(0).target.boxes.tolist() == [[10, 12, 30, 32]]
    runs = [10 * 48 + 12, *[20, 28] * 19, 20, 34 * 48 + 16]
    data = single(tmp_path, {"bbox": ..., "segmentation": {"size": [48, 64], "counts": runs}})
    assert data.whole.read(0).target.boxes.tolist() == [[10, 12, 30, 32]]


def test_masks_in_all_forms(tmp_path: Path):
    from pycocotools import mask

    wanted = np.zeros((48, 64), np.uint8)
    wanted[12:32, 10:30] = 1
    compressed = mask.encode(np.asfortranarray(wanted))["counts"]
    runs = [10 * 48 + 12, *[20, 28] * 19, 20, 34 * 48 + 16]
    flat = rectangle([10, 12, 30, 32])[0]
    forms = [[flat], flat, [flat, [1, 2, 3, 4]],  # a "polygon" of two points would be read as a box
             *({"size": [48, 64], "counts": counts} for counts in (runs, compressed.decode(), str(compressed)))]  # fmt: skip
    for form in forms:
        assert (single(tmp_path, {"segmentation": form}).whole.read(0).target.masks([0])[0] == wanted).all(), form


def test_masks_in_parts(tmp_path: Path):
    """Points in pairs, and run lengths of several parts in a list."""
    flat = rectangle([10, 12, 30, 32])[0]
    pairs = [list(point) for point in zip(flat[::2], flat[1::2], strict=True)]
    assert single(tmp_path, {"segmentation": [pairs]}).whole.read(0).target.masks([0]).sum() == 400
    upper = {"size": [48, 64], "counts": [10 * 48 + 12, *[10, 38] * 19, 10, 34 * 48 + 26]}
    lower = {"size": [48, 64], "counts": [10 * 48 + 22, *[10, 38] * 19, 10, 34 * 48 + 16]}
    assert single(tmp_path, {"segmentation": [upper, lower]}).whole.read(0).target.masks([0]).sum() == 400
    data = single(tmp_path, {"segmentation": [[10, 12, 30, 32]]})
    assert "annotation 1: polygon of fewer than three points" in said(data) and len(data.whole.read(0).target) == 1


@pytest.mark.parametrize(("mask", "words"), [
    ([[1, 1, 9e8, 1, 9e8, 20, 1, 20]], "polygon far outside its picture"),
    ({"size": [48, 64], "counts": "0" * 2 + "Pd00N"}, "run lengths do not fill"),
    ({"size": [48, 64], "counts": "PP3P"}, "mask that cannot be read"),
])  # fmt: skip
def test_masks_that_would_end_a_training_are_named(mask: Any, words: str, root: Path):
    """Far points took all memory, and run lengths below 0 raised in a loading process."""
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["annotations"][0]["segmentation"] = mask
    write_json(root, "instances_train.json", content)
    data = open_objects(root)
    assert f"annotation 1: {'mask whose ' if 'fill' in words else ''}{words}" in said(data)


def test_run_lengths_below_zero():
    text = encoded(np.ones((4, 4)))["counts"]
    assert run_counts(text) == [0, 16]
    for counts in ([20, -4], [8, -1, 9]):
        runs = "".join(_compressed(count) for count in counts)
        assert run_counts(runs) == counts
        assert segmentation_of({"size": [4, 4], "counts": runs}, (4, 4))[1]


def _compressed(value: int) -> str:
    """One number of COCO's compressed text (without differences, so for the first three of a mask)."""
    signs = ""
    while True:
        bits, value = value & 31, value >> 5
        last = value == (-1 if bits & 16 else 0)
        signs += chr(48 + (bits if last else bits | 32))
        if last:
            return signs


def test_a_text_nested_without_end(root: Path):
    (root / "annotations" / "instances_train.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"instances_train.json cannot be read as JSON"):
        open_objects(root)


def test_run_lengths_row_by_row(root: Path):
    """A common mistake of scripts: COCO's run lengths go down the columns."""
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        flat = np.zeros((48, 64), np.uint8)
        flat[y : y + height, x : x + width] = 1
        edges = np.flatnonzero(np.diff(flat.ravel(), prepend=0, append=0)).tolist()
        each["segmentation"] = {"size": [48, 64], "counts": np.diff([0, *edges, flat.size]).tolist()}
    write_json(root, "instances_train.json", content)
    with pytest.raises(UserError, match="boxes are not those of their masks.*run lengths row by row"):
        open_objects(root)


def test_a_mask_elsewhere_than_its_box(root: Path):
    for seed in range(20, 40):
        write_more(root, seed)
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["annotations"][0]["segmentation"] = rectangle([0, 0, 1, 1])
    content["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": [48 * 64]}
    x, y, width, height = content["annotations"][2]["bbox"]
    content["annotations"][2]["segmentation"] = rectangle([x, y, x + width // 2, y + height // 2])
    write_json(root, "instances_train.json", content)
    data = open_objects(root)
    assert "annotation 1: mask elsewhere than its box" in said(data)
    assert "annotation 2: mask without a pixel" in said(data)
    assert "annotation 3: box that is not the one around its mask, kept" in said(data)
    assert [len(data.split("train").read(i).target) for i in (0, 1)] == [1, 2]


def write_more(root: Path, seed: int) -> None:
    """One more picture of train."""
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    picture, found = scene(seed)
    picture.save(root / "train" / f"{seed}.png")
    more = coco([found], IDS)
    more["images"][0] |= {"id": seed, "file_name": f"{seed}.png"}
    for each in more["annotations"]:
        each |= {"id": len(content["annotations"]) + 1, "image_id": seed}
        content["annotations"].append(each)
    content["images"] += more["images"]
    write_json(root, "instances_train.json", content)


def test_a_picture_of_another_split_is_not_taken(root: Path):
    (root / "test").mkdir()
    (root / "train" / "2.png").rename(root / "test" / "2.png")
    data = open_objects(root)
    assert len(data.split("train")) == 2 and "2.png (image 2): picture that is not there" in said(data)


def test_pictures_of_both_splits_in_one_folder(root: Path):
    """As of competitions, whose training pictures are divided by lists: the folder is called for training, and holds all."""
    for i in range(2):
        (root / "val" / f"{i}.png").rename(root / "train" / f"v{i}.png")
    (root / "val").rmdir()
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    for each in content["images"]:
        each["file_name"] = f"v{each['file_name']}"
    write_json(root, "instances_val.json", content)
    assert open_objects(root).split("val").files == ["train/v0.png", "train/v1.png"]


def test_classes_that_nothing_shows_are_named(root: Path, capsys: pytest.CaptureFixture):
    for split in ("train", "val"):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        content["categories"] += [{"id": 8, "name": "green"}, {"id": 9, "name": "grey"}]
        if split == "val":
            content["annotations"][0]["category_id"] = 9
        write_json(root, f"instances_{split}.json", content)
    printed = output(capsys, "check-data", "--task", "detect", "--data", root)
    assert "note: class grey: not in any training image, but in validation" in printed
    assert "note: class green: not in any training image" in printed


@pytest.mark.parametrize("mask", [
    {"size": [48, 64], "counts": [5, "x"]}, {"size": [48, 64], "counts": "b'abc"}, {"size": 48, "counts": [3072]},
    [[None] * 6],
])  # fmt: skip
def test_masks_that_cannot_be_read_are_named(mask: Any, tmp_path: Path):
    with pytest.raises(UserError, match="annotation 1: "):
        single(tmp_path, {"segmentation": mask})


@pytest.mark.parametrize(("part", "odd"), [("annotations", None), ("images", "0.png"), ("images", {"id": [1]})])
def test_what_is_no_object_of_json(part: str, odd: Any, root: Path):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content[part].append(odd)
    write_json(root, "instances_train.json", content)
    with pytest.raises(UserError, match=rf"instances_train.json: number \d of {part} is "):
        open_objects(root)


def test_a_crowd_in_words(tmp_path: Path):
    for value, crowd in (("false", False), (False, False), ("0", False), (1.0, True), ("true", True)):
        if crowd:
            with pytest.raises(UserError, match="without any object"):
                single(tmp_path, {"iscrowd": value})
        else:
            assert single(tmp_path, {"iscrowd": value}).whole.read(0).target.crowd.tolist() == [False]


def test_boxes_in_shares_are_refused(root: Path):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    for each in content["annotations"]:
        each["bbox"] = [0.1, 0.2, 0.3, 0.4]
        each.pop("segmentation")
    write_json(root, "instances_train.json", content)
    (root / "annotations" / "instances_val.json").unlink()
    with pytest.raises(UserError, match="lie within a pixel; are they in shares"):
        open_objects(root)


def test_boxes_that_are_not_those_of_their_polygons(root: Path):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        each["segmentation"] = rectangle([x, y, x + width // 2, y + height // 2])
    write_json(root, "instances_train.json", content)
    with pytest.raises(UserError, match="boxes are not those of their masks"):
        open_objects(root)


def test_of_two_categories_of_one_name_the_empty_one_is_none(root: Path):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["categories"].insert(0, {"id": 0, "name": "red", "supercategory": "none"})
    write_json(root, "instances_train.json", content)
    assert open_objects(root).whole.info == {"category_ids": [3, 7]}


def test_a_second_file_of_another_name(root: Path):
    (root / "annotations" / "instances_val.json").rename(root / "annotations" / "val.json")
    assert {name: len(places) for name, places in open_objects(root).named.items()} == {"train": 3, "val": 2}


def test_nothing_to_measure_is_said(root: Path):
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    write_json(root, "instances_val.json", content | {"annotations": []})
    assert "all 2 images of val: have no object" in said(open_objects(root))


def test_a_box_a_pixel_outside_is_cut(tmp_path: Path):
    data = single(tmp_path, {"bbox": [-1, 20, 30, 29], "segmentation": None})
    assert data.whole.read(0).target.boxes.tolist() == [[0, 20, 29, 48]] and not data.left_out
    assert "annotation 1: box that reaches outside" in said(
        single(tmp_path, {"bbox": [40, 20, 60, 20], "segmentation": None})
    )


def test_corners_instead_of_sides(root: Path):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    for each in content["annotations"]:
        x, y, width, height = each["bbox"]
        each["bbox"] = [x + 20, y + 20, x + width + 20, y + height + 20]
    write_json(root, "instances_train.json", content)
    with pytest.raises(
        UserError, match=r"boxes reach outside their pictures \(first: annotations/instances_train.json: ann"
    ):
        open_objects(root)


@pytest.mark.parametrize(("there", "told"), [
    ("images/a.png", "a.png"),
    ("images/a.png", "C:\\shots\\images\\A.PNG"),
    ("images/my photo.png", "my%20photo.png"),
    ("images/50%25.png", "50%25.png"),
    ("train/images/a.png", "/data/upload/a.png"),
])  # fmt: skip
def test_pictures_by_other_names(there: str, told: str, tmp_path: Path):
    (tmp_path / there).parent.mkdir(parents=True)
    scene(0)[0].save(tmp_path / there)
    assert single(tmp_path, {}, {"file_name": told}).whole.files == [there]


def test_which_of_two_pictures(root: Path):
    """train/0.png and val/0.png: the file for val means its own."""
    assert open_objects(root).split("val").files == ["val/0.png", "val/1.png"]
    for folder in ("a", "b"):
        (root / folder).mkdir()
        scene(0)[0].save(root / folder / "5.png")
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    content["images"][0]["file_name"] = "5.png"
    write_json(root, "instances_val.json", content)
    with pytest.raises(UserError, match=r"5.png of .*instances_val.json may be a/5.png or b/5.png"):
        open_objects(root)


def test_another_picture_of_the_same_name_is_none(tmp_path: Path):
    """What is told of a folder, or of a split, that is there does not mean a picture in another."""
    for folder in ("cam1", "cam2"):
        (tmp_path / folder).mkdir()
        scene(0)[0].save(tmp_path / folder / f"{folder}.png")
    scene(0)[0].save(tmp_path / "cam1" / "0.png")
    content = coco([[("red", [10, 12, 30, 32])]], IDS)
    for name in ("cam2/0.png", "train/0.png"):
        content["images"][0]["file_name"] = name
        write_json(tmp_path, "instances.json", content)
        if name.startswith("train"):
            (tmp_path / "cam1").rename(tmp_path / "test")
        with pytest.raises(UserError, match=f"1 of 1 pictures are not there.*{name}"):
            open_objects(tmp_path)


def test_pictures_beside_masks_and_with_percent_signs(tmp_path: Path):
    for folder in ("images", "masks", "thumbs"):
        (tmp_path / folder).mkdir()
        scene(0)[0].save(tmp_path / folder / "a%20b.png")
    content = coco([[("red", [10, 12, 30, 32])]], IDS)
    content["images"][0]["file_name"] = "a b.png"
    write_json(tmp_path, "instances.json", content)
    assert open_objects(tmp_path).whole.files == ["images/a%20b.png"]


def test_missing_pictures_are_named(root: Path):
    (root / "train" / "1.png").unlink()
    for name in ("0", "1"):
        (root / "val" / f"{name}.png").rename(root / "val" / f"kept{name}.png")
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    for i, image in enumerate(content["images"]):
        image["file_name"] = f"kept{i}.png"
    write_json(root, "instances_val.json", content)
    data = open_objects(root)
    assert len(data.split("train")) == 2 and "1.png (image 1): picture that is not there" in said(data)
    for picture in (root / "train").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match=r"3 of 3 pictures are not there \(first: 0.png\)"):
        open_objects(root)


def test_pictures_without_objects_are_kept(root: Path):
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 1]
    write_json(root, "instances_train.json", content)
    train = open_objects(root).split("train")
    assert [len(train.read(i).target) for i in range(3)] == [2, 0, 2]
    write_json(root, "instances_train.json", content | {"annotations": []})
    with pytest.raises(UserError, match="3 training images without any object"):
        open_objects(root)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("frame", ["file", "upright"])
def test_turned_photos(orientation: int, frame: str, tmp_path: Path):
    """Annotations for the pixels as they lie in the file, or as they are seen, mean the same objects."""
    wanted = np.zeros((48, 64), np.uint8)
    wanted[12:32, 10:20] = 1
    picture = Image.fromarray(np.stack([200 * wanted] * 3, -1))
    exif = picture.getexif()
    exif[274] = orientation
    picture.save(tmp_path / "0.jpg", exif=exif, quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "0.jpg")).convert("L")) > 100
    rows, columns = upright.nonzero()
    box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    told = [10, 12, 20, 32] if frame == "file" else box
    height, width = (48, 64) if frame == "file" else (64, 48)
    for form in ("polygon", "runs"):
        from glmix.data.objects import encoded

        mask = wanted if frame == "file" else upright
        segmentation = rectangle(told) if form == "polygon" else encoded(mask)
        x0, y0, x1, y1 = told
        data = single(tmp_path, {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": segmentation},
                      {"file_name": "0.jpg", "height": height, "width": width})  # fmt: skip
        sample = data.whole.read(0)
        assert sample.image.size == (48, 64) and sample.target.size == (64, 48)
        assert sample.target.boxes.tolist() == [box]
        assert (sample.target.masks([0])[0] == upright).all()


def test_turned_photos_that_do_not_tell(tmp_path: Path):
    picture, _ = scene(0)
    exif = picture.getexif()
    exif[274] = 3
    picture.save(tmp_path / "0.jpg", exif=exif)
    with pytest.raises(BadImage, match=r"0.jpg: is turned by EXIF \(orientation 3\), and nothing tells"):
        single(tmp_path, {}, {"file_name": "0.jpg"}).whole.read(0)
    told = single(tmp_path, {}, {"file_name": "0.jpg", "height": ..., "width": ...},
                  images=[{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "0.jpg"}],
                  annotations=[{"id": 1, "image_id": i, "category_id": 3, "bbox": [1, 1, 9, 9]} for i in (0, 1)])  # fmt: skip
    assert told.whole.files == ["0.png"] and "0.jpg: turned by EXIF" in said(told)


def test_annotations_for_another_size(tmp_path: Path):
    with pytest.raises(BadImage, match="0.png: is 64 x 48 pixels, its annotations are for 640 x 480"):
        single(tmp_path, {}, {"height": 480, "width": 640}).whole.read(0)


@pytest.mark.parametrize(("content", "words"), [
    ("{", "cannot be read as JSON"),
    ('{"images": [], "annotations": []}', "has no list of categories"),
    ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "needs an id and a file_name"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
     "categories 1 and 2 have the same name"),
])  # fmt: skip
def test_no_coco(content: str, words: str, tmp_path: Path):
    (tmp_path / "instances.json").write_text(content)
    with pytest.raises(UserError, match=words):
        open_objects(tmp_path)


def test_a_tar_is_the_same_data(root: Path, tmp_path_factory: pytest.TempPathFactory):
    packed = tmp_path_factory.mktemp("packed") / "set.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(root, "set")
    folder, tarred = open_objects(root).split("val"), open_objects(packed).split("val")
    assert [f"set/{name}" for name in folder.files] == tarred.files
    assert tarred.read(1).target.boxes.tolist() == folder.read(1).target.boxes.tolist()
    digest = folder.digest()
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    content["annotations"][0]["bbox"][0] += 0.5
    write_json(root, "instances_val.json", content)
    assert open_objects(root).split("val").digest() != digest  # a run does not go on with other boxes


# --- VOC


def write_voc(root: Path, boxes: list[list[int]], difficult: int = 0, name: str = "a") -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    scene(0)[0].save(root / "JPEGImages" / f"{name}.png")
    parts = "".join(
        f"<object><name>red</name><difficult>{difficult}</difficult><bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin>"
        f"<ymin>{y0}</ymin><ymax>{y1}</ymax></bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    size = "<size><width>64</width><height>48</height></size>"
    (root / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><filename>was.jpg</filename>{size}{parts}</annotation>"
    )


def test_voc_counts_from_1_unless_a_box_begins_at_0(tmp_path: Path):
    write_voc(tmp_path, [[1, 5, 20, 30]])
    assert open_objects(tmp_path).whole.read(0).target.boxes.tolist() == [[0, 4, 20, 30]]
    write_voc(tmp_path, [[1, 5, 20, 30], [0, 2, 10, 10]])
    assert open_objects(tmp_path).whole.read(0).target.boxes.tolist() == [[1, 5, 20, 30], [0, 2, 10, 10]]


def test_voc_splits_and_difficult_objects(tmp_path: Path):
    write_voc(tmp_path, [[1, 5, 20, 30]])
    write_voc(tmp_path, [[1, 5, 20, 30]], difficult=1, name="b")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b 1\n")
    (tmp_path / "ImageSets/Main/red_train.txt").write_text("b -1\n")
    data = open_objects(tmp_path)
    assert data.split("train").files == ["JPEGImages/a.png"]
    assert data.split("val").read(0).target.crowd.tolist() == [True]
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match=r"Annotations/b.xml cannot be read as XML"):
        open_objects(tmp_path)


def test_voc_without_a_size(tmp_path: Path):
    """The picture tells it; of one turned by EXIF nothing does."""
    write_voc(tmp_path, [[5, 6, 20, 22]])
    for text in ("", "<size><width>0</width><height>0</height></size>"):
        path = tmp_path / "Annotations" / "a.xml"
        path.write_text(re.sub(r"<size>.*?</size>|(?=</annotation>)", text, path.read_text(), count=1, flags=re.DOTALL))
        assert open_objects(tmp_path).whole.read(0).target.boxes.tolist() == [[4, 5, 20, 22]]


def test_voc_lists_of_any_names(tmp_path: Path):
    names = {"img0_jpg.rf.abc0": "train", "my photo 1": "train", "c": "val"}
    for name, split in names.items():
        write_voc(tmp_path, [[1, 5, 20, 30]], name=name)
        with open(tmp_path / f"ImageSets/Main/{split}.txt", "a") as file:
            file.write(f"{name}\n")
    data = open_objects(tmp_path)
    assert {split: len(places) for split, places in data.named.items()} == {"train": 2, "val": 1}
    (tmp_path / "ImageSets/Main/val.txt").write_text("c\ngone\n")
    assert "gone (ImageSets/Main/val.txt): in a list of a split, but not there" in said(open_objects(tmp_path))
    (tmp_path / "ImageSets/Main/val.txt").write_text("c\nmy photo 1\n")
    with pytest.raises(UserError, match="my photo 1 is in the lists of"):
        open_objects(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("gone\n")
    with pytest.raises(UserError, match="nothing that the lists of splits name is there"):
        open_objects(tmp_path)


# --- YOLO


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    for split in ("train", "valid"):
        for folder in ("images", "labels"):
            (tmp_path / split / folder).mkdir(parents=True)
        for name in "ab":
            scene(0)[0].save(tmp_path / split / "images" / f"{name}.png")
    (tmp_path / "train/labels/a.txt").write_text("1 0.5 0.5 0.25 0.5\n0 0 0 0.5 0 0.5 0.25\n")
    (tmp_path / "valid/labels/a.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: [red, blue]\n")
    return tmp_path


def test_yolo_boxes_and_polygons(yolo: Path):
    data = open_objects(yolo)
    train = data.split("train")
    assert (data.whole.classes, data.whole.info["category_ids"]) == (["red", "blue"], [0, 1])
    objects = train.read(0).target
    assert objects.boxes.tolist() == [[24, 12, 40, 36], [0, 0, 32, 12]] and objects.labels.tolist() == [1, 0]
    assert objects.segmentations[0] is None and objects.masks([1]).sum() == pytest.approx(32 * 12 / 2, rel=0.1)
    assert len(train.read(1).target) == 0  # no text file: nothing in it
    assert train.take([0]).targets[0].rows[0].id == 1
    (yolo / "data.yaml").write_text(
        "path: /gone/data\ntrain: train/images\nval: valid/images\nnames: {0: red, 3: blue}\n"
    )
    (yolo / "train/labels/a.txt").write_text("3 0.5 0.5 0.25 0.5\n")
    data = open_objects(yolo / "data.yaml")
    assert data.whole.info["category_ids"] == [0, 3] and data.split("train").read(0).target.labels.tolist() == [1]


@pytest.mark.parametrize(("line", "words"), [
    ("2 0.5 0.5 0.1 0.1", "train/labels/a.txt: line 1 has class 2"),
    ("0 0.5 0.5 0.1", "train/labels/a.txt: line 1 has 3 numbers"),
    ("0 0.5 0.5 0.1 0.1 0.9", "train/labels/a.txt: line 1 has 5 numbers"),
    ("0 320 240 100 90", "train/labels/a.txt: line 1 is not in shares"),
    ("red 0.5 0.5 0.1 0.1", "train/labels/a.txt: line 1 is not numbers"),
])  # fmt: skip
def test_yolo_refused_by_line(line: str, words: str, yolo: Path):
    (yolo / "train/labels/a.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        open_objects(yolo)


def test_other_layouts(tmp_path: Path, photos: Path):
    with pytest.raises(UserError, match="class folders are for --task classify"):
        open_objects(photos)
    with pytest.raises(UserError, match="no such folder or tar"):
        open_objects(tmp_path / "nowhere")


def test_scenes_have_boxes_and_masks():
    sample = open_objects("scenes").split("val").read(2)
    for i, (x0, y0, x1, y1) in enumerate(sample.target.boxes):
        rows, columns = sample.target.masks([i])[0].nonzero()
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)


def test_yolo_labels_of_no_picture_are_named(yolo: Path):
    (yolo / "train/labels/a.txt").rename(yolo / "train/labels/A.TXT")
    (yolo / "train/labels/other.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    data = open_objects(yolo)
    assert len(data.split("train").read(0).target) == 2  # capitals do not count
    assert "train/labels/other.txt: labels without a picture" in said(data)


def test_yolo_pictures_of_both_splits_are_for_training(yolo: Path):
    """As in samples for a first try, whose `train` and `val` are one folder."""
    described = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(described.replace("../valid", "../train"))
    data = open_objects(yolo)
    assert sorted(data.split("train").files + data.split("val").files) == ["train/images/a.png", "train/images/b.png"]
    assert "train/images/a.png, train/images/b.png: pictures of val, which train has too" in said(data)
    (yolo / "data.yaml").write_text(
        described.replace("../valid/images", "[../valid/images, train/images, valid/images]")
    )
    data = open_objects(yolo)
    assert data.split("val").files == ["valid/images/a.png", "valid/images/b.png"] and "which train has too" in said(
        data
    )


def test_yolo_key_points_are_passed_over(yolo: Path):
    described = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(described + "kpt_shape: [3, 2]\n")
    for path in yolo.rglob("a.txt"):
        path.write_text("0 0.5 0.5 0.25 0.5 0.1 0.1 0.2 0.2 0.3 0.3\n")
    assert open_objects(yolo).split("train").read(0).target.boxes.tolist() == [[24, 12, 40, 36]]
    (yolo / "data.yaml").write_text(described + "kpt_shape: [4, 2]\n")
    with pytest.raises(UserError, match="has 10 numbers behind the class; by kpt_shape it has 12"):
        open_objects(yolo)


@pytest.mark.parametrize(("names", "words"), [
    ("nc: 2\nnames: [cat, cat]", "two classes are called cat"),
    ("nc: 3\nnames: [red, blue]", "nc is 3, and 2 classes have names"),
])  # fmt: skip
def test_yolo_lists_that_cannot_be_right(names: str, words: str, yolo: Path):
    (yolo / "data.yaml").write_text(f"train: train/images\nval: valid/images\n{names}\n")
    with pytest.raises(UserError, match=words):
        open_objects(yolo)


def test_yolo_texts(yolo: Path):
    """A list of paths with spaces, and labels that are no text."""
    (yolo / "train/images/a.png").rename(yolo / "train/images/a b.png")
    (yolo / "train/labels/a.txt").rename(yolo / "train/labels/a b.txt")
    (yolo / "list.txt").write_text("./train/images/a b.png\n")
    (yolo / "data.yaml").write_text("train: list.txt\nval: valid/images\nnames: [red, blue]\n")
    assert open_objects(yolo).split("train").files == ["train/images/a b.png"]
    (yolo / "valid/labels/a.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(UserError, match=r"valid/labels/a.txt cannot be read as text"):
        open_objects(yolo)


def test_yolo_described_elsewhere(yolo: Path, tmp_path_factory: pytest.TempPathFactory):
    """A data.yaml beside one's notes, whose path tells where the data lies; and one that is none."""
    file = tmp_path_factory.mktemp("notes") / "mine.yaml"
    file.write_text(f"path: {yolo}\ntrain: train/images\nval: valid/images\nnames: [red, blue]\n")
    assert open_objects(file).split("train").files == ["train/images/a.png", "train/images/b.png"]
    for text, words in (("[1, 2", "cannot be read as YAML"), ("- a\n", "names neither classes nor splits")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            open_objects(file)
