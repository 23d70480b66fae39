"""What counts as an image, a class and a split in folders as people and systems leave them; what is left out is named."""

import io
import os
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from glmix import UserError
from glmix.data.folders import image_files
from glmix.data.images import BadImage
from glmix.data.naming import number_labels
from glmix.data.samples import LeftOut
from glmix.data.scenes import SceneSet
from glmix.data.sources import open_data, open_evaluation, open_split
from glmix.data.voc import VOID, open_masks


def picture(value: int = 99, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 20, 30)).save(buffer, form)
    return buffer.getvalue()


PNG = picture()


def fill(root: Path, names: Iterable[str], data: bytes = PNG) -> Path:
    """Files in a folder; a name that ends in a slash is an empty folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    return root


def packed(root: Path, path: Path, name: str = ".") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname=name)
    return path


def numbered(folders: str, count: int = 4) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders.split() for i in range(count)]


def left_out(data: Path) -> str:
    return "; ".join(map(str, open_data(data).left_out))


# the same data wherever it lies, and what is held out of it


def test_data_is_the_same_wherever_it_lies(tmp_path: Path):
    """Its folder, one around it, a way round, a link, and tars packed in three ways."""
    tree = fill(tmp_path / "a" / "pets", numbered("cat dog sheep", 30))
    (tmp_path / "link").symlink_to(tree)
    ways = [tree, tmp_path / "a", tree / ".." / "pets", tree / "..", tmp_path / "link", f"{tree}/"]
    ways += [packed(tree, tmp_path / f"{i}.tar", name) for i, name in enumerate((".", "pets", "some/where/pets"))]
    for split in ("train", "val"):
        found = [open_split(way, split) for way in ways]
        assert len({source.digest() for source in found}) == 1
        assert all(source.files == found[0].files for source in found)
    assert found[0].files[0].startswith("cat/")


def test_the_digest_of_a_folder_is_of_names_sizes_and_classes(tmp_path: Path):
    import hashlib

    tree = fill(tmp_path / "pets", numbered("train/cat train/dog val/cat val/dog", 2))
    text = "".join(f"val/{name}/{i}.png\t{len(PNG)}\t{name}\n" for name in ("cat", "dog") for i in range(2))
    assert open_split(tree, "val").digest() == hashlib.sha256(text.encode()).hexdigest()
    before = open_split(tree, "train").digest()
    (tree / "train/cat/1.png").write_bytes(PNG + b"\0")
    assert open_split(tree, "train").digest() != before


@pytest.mark.parametrize("sizes", [[3] * 20, [1, 2, 9, 10, 25, 400], [2, 1, 1, 2]])
def test_a_tenth_of_each_class_is_held_out(tmp_path: Path, sizes: list[int]):
    tree = fill(tmp_path, [f"c{k:02d}/{i}.png" for k, size in enumerate(sizes) for i in range(size)])
    train, val = open_split(tree, "train"), open_split(tree, "val")
    held, kept = Counter(val.targets), Counter(train.targets)
    expected = [max(1, round(size / 10)) if size > 1 else 0 for size in sizes]
    assert [held[k] for k in range(len(sizes))] == expected
    assert [held[k] + kept[k] for k in range(len(sizes))] == sizes
    assert not set(train.files) & set(val.files)
    names = [{f.rpartition("/")[2] for f in val.files if f.startswith(f"c{k:02d}/")} for k in range(len(sizes))]
    assert len(sizes) < 10 or len(set(map(frozenset, names))) > 1  # not the same names in every class


def test_one_file_listed_twice_is_in_one_split(tmp_path: Path):
    fill(tmp_path, [f"{i}.png" for i in range(40)])
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'}" for i in range(40)] * 2
    (tmp_path / "x.csv").write_text("\n".join(rows))
    assert not set(open_split(tmp_path / "x.csv", "train").files) & set(open_split(tmp_path / "x.csv", "val").files)


def test_what_was_held_out_is_found_after_files_were_added(tmp_path: Path):
    tree = fill(tmp_path / "pets", numbered("cat dog", 50))
    assert open_data(tree).made
    before = open_split(tree, "val")
    prints = set(before.fingerprints(sizes=True))
    fill(tree, [f"{name}/new{i}.png" for name in ("cat", "dog", "ant") for i in range(30)])
    again = open_data(tree).held_out(prints)
    assert again is not None and again.files == before.files
    os.rename(tree, tmp_path / "train")  # and below another folder
    moved = open_data(tmp_path).held_out(prints)
    assert moved is not None and len(moved) == len(before) and moved.fingerprints() == before.fingerprints()
    for name in before.files[:4]:
        (tmp_path / "train" / name).unlink()
    some = open_data(tmp_path).held_out(prints)
    assert some is not None and len(some) == len(before) - 4
    assert open_data(fill(tmp_path / "same names", numbered("cat dog", 50), PNG + b"0")).held_out(prints) is None
    assert open_data(fill(tmp_path / "other", numbered("bus car", 50))).held_out(prints) is None
    assert open_data(tmp_path / "other").held_out(set()) is None


def test_a_class_of_one_image_alone_leaves_nothing_to_hold_out(tmp_path: Path):
    with pytest.raises(UserError, match="one image a class"):
        open_split(fill(tmp_path, ["cat/1.png", "dog/1.png"]), "val")


# what is no image and no class

RUBBISH = (
    ".ipynb_checkpoints/1.png @eaDir/cat/1.png __MACOSX/cat/._1.png .thumbnails/1.png cat/.cache/1.png cat/._0.png "
    "cat/.DS_Store dog/Thumbs.db dog/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg #recycle/1.png $RECYCLE.BIN/1.png "
    "lost+found/1.png .Trash-1000/files/1.png dog/desktop.ini cat/0.png:Zone.Identifier .@__thumb/1.png"
).split()


@pytest.mark.parametrize("splits", [("",), ("train/", "val/")])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_systems_leave_is_no_image_and_no_class(tmp_path: Path, splits: tuple[str, ...], kind: str):
    tree = fill(tmp_path / "pets", [s + name for s in splits for name in numbered("cat dog") + RUBBISH])
    data = tree if kind == "folder" else packed(tree, tmp_path / "pets.tar", "pets")
    whole = open_data(data)
    assert whole.whole.classes == ["cat", "dog"]
    assert whole.whole.files == sorted(s + name for s in splits for name in numbered("cat dog"))
    assert not whole.left_out
    assert image_files(tree) == whole.whole.files


def test_what_systems_leave_among_shards(tmp_path: Path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(6):
            writer.write({"__key__": f"{i:04d}", "png": PNG, "cls": i % 2})
    with tarfile.open(tmp_path / "a.tar") as tar, tarfile.open(tmp_path / "b.tar", "w") as mac:
        for member in tar:
            fork = tarfile.TarInfo(f"._{member.name}")
            fork.size = len(PNG)
            mac.addfile(fork, io.BytesIO(PNG))
            mac.addfile(member, tar.extractfile(member))
    os.rename(tmp_path / "b.tar", tmp_path / "a.tar")
    fill(tmp_path, ["._a.tar", "@eaDir/a.tar", ".cache/b.tar"], b"no tar")
    for data in (tmp_path, tmp_path / "a.tar"):
        assert open_evaluation(data).files == [f"{i:04d}.png" for i in range(6)]
    fill(tmp_path, ["._x.parquet", ".y/z.parquet"], b"no parquet")
    assert len(open_evaluation(tmp_path)) == 6


def test_links_to_a_parent_lead_nowhere(tmp_path: Path):
    tree = fill(tmp_path / "pets", numbered("cat dog"))
    for place, target in {"cat/up": "..", "cat/self": ".", "dog/top": str(tmp_path), "dog/deep": "../dog"}.items():
        (tree / place).symlink_to(target)
    assert len(open_evaluation(tree)) == 8
    for one, other in (("a", "b"), ("b", "a")):
        (fill(tmp_path / "loops", [f"{one}/1.png"]) / one / "to").symlink_to(f"../{other}")
    assert set(open_evaluation(tmp_path / "loops").files) == {"a/1.png", "b/1.png", "a/to/1.png", "b/to/1.png"}


def test_links_to_folders_elsewhere_are_classes(tmp_path: Path):
    """Also to one that lies within, under another split's or class's name."""
    store = fill(tmp_path / "pets" / "val", numbered("cat dog"))
    (tmp_path / "pets" / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).symlink_to(store / name)
    assert len(open_split(tmp_path / "pets", "train")) == 8


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree, scan = fill(tmp_path, numbered("cat dog sheep")), os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "dog: folder that cannot be read (Permission denied)" in left_out(tree)


# what is left out is named


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_of_any_ending_are_read_and_the_others_named(tmp_path: Path, kind: str):
    tree = fill(tmp_path / "pets", ["cat/1", "cat/2.jpg_large", "cat/3.JPE", "dog/4.tmp", "dog/5.PNG", "owl/6.webp"])
    for name, form in (("owl/7", "WEBP"), ("owl/8.bin", "TIFF"), ("owl/9.qoi", "QOI"), ("dog/a.gif~", "GIF")):
        (tree / name).write_bytes(picture(50, form))
    fill(tree, ["ant/x.svg", "ant/y.svg", "ant/z.txt", "dog/notes", "fox/"], b"no image")
    data = tree if kind == "folder" else packed(tree, tmp_path / "pets.tar")
    images = open_evaluation(data)
    assert images.classes == ["cat", "dog", "owl"] and len(images) == 10
    assert {images.read(i).image.getpixel((0, 0))[0] for i in range(3)} == {99}
    said = left_out(data)
    assert "ant/x.svg, ant/y.svg: no image that can be read (.svg)" in said
    assert "ant/z.txt: no image that can be read (.txt)" in said
    assert "dog/notes: no image that can be read (without ending)" in said
    assert "ant, fox: folder without an image that can be read, so no class" in said


def test_images_beside_class_folders_are_named(tmp_path: Path):
    assert "0.png, 1.png: image in no class folder" in left_out(
        fill(tmp_path, ["0.png", "1.png", *numbered("cat dog")])
    )


def test_what_is_left_out_stays_short(tmp_path: Path):
    found = LeftOut()
    for i in range(10000):
        found.add(f"kind {i % 500}", f"file {i}")
    listed = found.listed()
    assert len(listed) <= LeftOut.REASONS + 1
    assert str(listed[0]) == "file 0, file 500, file 1000 and 17 more: kind 0"
    assert sum(len(row.name) for row in listed) < 3000
    tree = fill(fill(tmp_path, numbered("cat dog")), [f"cat/{i}.x" for i in range(10)], b"?")
    assert left_out(tree) == "cat/0.x, cat/1.x, cat/2.x and 7 more: no image that can be read (.x)"


def test_nothing_to_read_says_what_is_there(tmp_path: Path):
    with pytest.raises(UserError, match=r"no images for train.*; left out cat/1\.svg: no image that can be read"):
        open_split(fill(tmp_path, ["cat/1.svg"], b"<svg/>"), "train")


def test_links_within_a_tar(tmp_path: Path):
    tree = fill(tmp_path / "pets", numbered("cat dog"))
    (tree / "dog" / "link.png").symlink_to("../cat/0.png")
    (tree / "dog" / "lost.png").symlink_to("nowhere.png")
    os.link(tree / "cat" / "1.png", tree / "dog" / "hard.png")
    data = packed(tree, tmp_path / "pets.tar")
    images = open_evaluation(data)
    assert len(images) == 10 and images.read(images.files.index("dog/link.png")).image.size == (8, 8)
    assert "dog/lost.png: link to what is not in the tar" in left_out(data)


# splits as published sets call them


@pytest.mark.parametrize(
    "names",
    [
        "train val",
        "Train Test",
        "TRAIN VALIDATION",
        "training testing",
        "training_set test_set",
        "Training_Set dev-set",
        "TrainSet ValSet",
        "train2017 val2017",
        "imagenet_train imagenet_val",
        "traindata testdata",
        "trainimages validationimages",
        "seg_train/seg_train seg_test/seg_test",
        "train/train valid/valid",
        "Train/TRAIN eval/Eval",
        "flowers-train flowers-eval",
        "images_train images_test",
        "train flowers_val",
        "flowers_training test",
    ],
)
@pytest.mark.parametrize("around", ["", "archive/some set/"])
def test_split_folders_as_published_sets_call_them(tmp_path: Path, names: str, around: str):
    train, val = (around + name for name in names.split())
    files = [f"{folder}/{kind}/{i}.png" for folder in (train, val) for kind in ("cat", "dog") for i in range(3)]
    tree = fill(tmp_path / "x", files)
    for data in (tree, packed(tree, tmp_path / "x.tar")):
        found = open_data(data)
        assert not found.made
        assert found.split("train").classes == found.split("val").classes == ["cat", "dog"]
        assert [f.startswith(train.removeprefix(around)) for f in found.split("train").files] == [True] * 6
        assert [f.startswith(val.removeprefix(around)) for f in found.evaluation().files] == [True] * 6


def test_a_test_set_beside_a_validation_set_is_left_out_and_named(tmp_path: Path):
    tree = fill(tmp_path, numbered("train/cat train/dog valid/cat valid/dog test/cat test/dog other/cat"))
    assert {f.split("/")[0] for f in open_split(tree, "val").files} == {"valid"}
    assert "other/cat/0.png, other/cat/1.png, other/cat/2.png and 9 more: image of no split that is used" in left_out(
        tree
    )
    unlabelled = fill(tmp_path / "kaggle", numbered("train/cat train/dog test", 20))
    assert open_data(unlabelled).made and len(open_split(unlabelled, "train")) == 36
    assert "test/0.png" in left_out(unlabelled)


@pytest.mark.parametrize(
    "classes",
    [
        "train bus car",
        "test control",
        "valid invalid",
        "bullet_train test_tube cat",
        "mask no_mask",
        "class_1 class_2",
        "label_0 label_1",
        "image1 image2",
        "test1 test2",
        "dev prod",
        "fine coarse",
        "object background",
    ],
)
def test_classes_with_such_words_stay_classes(tmp_path: Path, classes: str):
    assert open_evaluation(fill(tmp_path, numbered(classes))).classes == sorted(classes.split())


def test_classes_with_such_words_and_folders_in_them(tmp_path: Path):
    tree = fill(tmp_path, numbered("steam_train/day1 steam_train/day2 test_tube/day8 test_tube/day9 cat/day1"))
    assert open_evaluation(tree).classes == ["cat", "steam_train", "test_tube"]


def test_a_split_beside_other_classes_is_asked_about(tmp_path: Path):
    tree = fill(tmp_path, numbered("train/red train/blue bus/red car/red"))
    with pytest.raises(UserError, match="no val/ folder beside train/"):
        open_split(tree, "val")


def test_splits_without_a_class_in_common_are_refused(tmp_path: Path):
    """As where validation images lie in one folder, with their labels in a list beside it."""
    tree = fill(tmp_path, numbered("train/n1/images train/n2/images val/images"))
    with pytest.raises(UserError, match="no class is in both splits .train: n1 .*; val: images"):
        open_split(tree, "train")


def test_one_split_alone_is_split(tmp_path: Path):
    tree = fill(tmp_path, numbered("train/cat train/dog", 30))
    data = open_data(tree)
    assert data.made and len(data.split("train")) == 54 and len(data.split("val")) == 6
    inside = open_data(tree / "train")
    assert inside.split("val").fingerprints() == data.split("val").fingerprints()


LAYOUTS = {
    "PASCAL VOC": ["JPEGImages/1.png", "Annotations/1.xml", "ImageSets/Main/train.txt", "SegmentationClass/1.png"],
    "PASCAL VOC ": ["VOCdevkit/VOC2007/JPEGImages/1.png", "VOCdevkit/VOC2007/Annotations/1.xml"],
    "COCO": ["train2017/1.png", "val2017/1.png", "annotations/instances_train2017.json"],
    "COCO ": ["train/1.png", "valid/1.png", "train/_annotations.coco.json"],
    "CamVid": numbered("train trainannot val valannot test testannot"),
    "YOLO": ["images/train/1.png", "images/val/1.png", "labels/train/1.txt", "labels/val/1.txt"],
    "YOLO ": ["train/images/1.png", "train/labels/1.txt", "valid/images/1.png", "valid/labels/1.txt", "data.yaml"],
    "Cityscapes": numbered("leftImg8bit/train/bonn gtFine/train/bonn"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("around", ["", "set/"])
def test_sets_of_another_task_are_named_as_such(tmp_path: Path, layout: str, around: str):
    tree = fill(tmp_path, [around + name for name in LAYOUTS[layout]])
    with pytest.raises(UserError, match=f"detection or segmentation set .{layout.strip()} layout.; .* class folders"):
        open_data(tree)


@pytest.mark.parametrize(
    "folders", ["images masks", "img gt", "train val test", "Images Annotations", "train train_masks"]
)
def test_parts_and_splits_without_classes_are_no_classes(tmp_path: Path, folders: str):
    with pytest.raises(UserError, match="hold images, but no class folders; a classifier needs"):
        open_data(fill(tmp_path, numbered(folders)))


# names in one Unicode form


def test_names_are_compared_in_one_form(tmp_path: Path):
    names = ["Café", "Löwe", "日本猫", "plain"]
    composed, split = ([unicodedata.normalize(form, name) for name in names] for form in ("NFC", "NFD"))
    assert composed != split
    tree = fill(tmp_path / "both", numbered(" ".join(f"train/{name}" for name in composed)))
    fill(tree, numbered(" ".join(f"val/{name}" for name in split)))
    train, val = open_split(tree, "train"), open_split(tree, "val")
    assert train.classes == val.classes == sorted(composed) and len(train) == len(val) == 16
    assert all(val.read(i).image.size == (8, 8) for i in range(16))
    one, other = (fill(tmp_path / form, numbered(" ".join(found))) for form, found in (("c", composed), ("d", split)))
    assert open_split(one, "val").digest() == open_split(other, "val").digest()
    assert number_labels([*composed, *split], None, "x") == number_labels([*composed, *composed], None, "x")
    assert number_labels(split, composed, "x")[0] == [0, 1, 2, 3]


def test_names_that_are_not_utf8(tmp_path: Path):
    tree = fill(tmp_path, numbered("cat dog"))
    os.rename(os.fsencode(tree / "dog"), os.fsencode(tree) + b"/d\xf6g")
    images = open_evaluation(tree)
    assert len(images.classes) == 2 and len(images.digest()) == 64 and len(set(images.fingerprints())) == 8
    assert images.read(7).image.size == (8, 8)


# one rule for labels


@pytest.mark.parametrize(
    ("labels", "targets", "classes"),
    [
        ([2.0, 0.0, 10.0], [1, 0, 2], ["0", "2", "10"]),
        (["2", " 10 ", "0"], [1, 2, 0], ["0", "2", "10"]),
        (["2.0", 2, np.int64(2), np.float32(2), "3"], [0, 0, 0, 0, 1], ["2", "3"]),
        ([True, False, 1], [1, 0, 1], ["0", "1"]),
        (["True", "False", "true"], [1, 0, 1], ["0", "1"]),
        (["true", "maybe"], [1, 0], ["maybe", "true"]),
        ([1, -1, None, float("nan"), "", 0], [1, -1, -1, -1, -1, 0], ["0", "1"]),
        (["007", "7", "b"], [1, 0, 2], ["7", "007", "b"]),
        (["v1.5", "1.5"], [1, 0], ["1.5", "v1.5"]),
    ],
)
def test_labels_by_one_rule(labels: list, targets: list[int], classes: list[str]):
    assert number_labels(labels, None, "x") == (targets, classes)


def test_labels_that_are_none_are_named():
    for label in (0.5, [1], b"cat", float("inf")):
        with pytest.raises(UserError, match="x: a label that is none"):
            number_labels([1, label], None, "x")
    assert number_labels(["0001", 1.0, True, "dog"], ["cat", "dog"], "x")[0] == [1, 1, 1, 1]


# masks


def test_masks_of_another_size_or_kind_are_bad_images(tmp_path: Path):
    tree = fill(tmp_path, [f"JPEGImages/{i}.jpg" for i in range(4)], picture(9, "JPEG"))
    (tree / "SegmentationObject").mkdir()
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 1
    mask[5] = VOID
    for i, array in enumerate((mask, mask[:7], np.stack([mask] * 3, 2), mask)):
        Image.fromarray(array).save(tree / f"SegmentationObject/{i}.png")
    (tree / "SegmentationObject/3.png").write_bytes(b"\x89PNG no more")
    (tree / "SegmentationObject/._0.png").write_bytes(b"fork")
    images = open_masks(str(tree))
    assert images.files == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(images.read(0).target, mask)
    for index, reason in ((1, "size is not the image's"), (2, "no mask of one channel"), (3, "3.png")):
        with pytest.raises(BadImage, match=reason):
            images.read(index)
    assert images.take([1, 0]).read(1).target.dtype == np.uint8
    with pytest.raises(BadImage):
        images.take([1, 0]).read(0)


def test_masks_of_scenes():
    images = open_masks("scenes")
    sample = images.read(5)
    scene = SceneSet(6, seed=1).scene(5)
    np.testing.assert_array_equal(sample.target, scene.instances)
    np.testing.assert_array_equal(np.asarray(sample.image), scene.image)
    assert len(images) == 800
