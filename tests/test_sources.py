"""Whatever holds the images, the same ones come out, named where they are bad, and every mistake has its line."""

import csv
import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image
from torchvision.transforms.functional import to_tensor

from glmix import UserError
from glmix.data.folders import scan_folders
from glmix.data.images import BadImage
from glmix.data.loading import EpochOrder, Prepared, make_loader
from glmix.data.samples import Sample, Source
from glmix.data.sources import open_data, open_evaluation, open_split

KINDS = ["shards", "parquet", "csv"]
Found = tuple[str, bytes]  # class, file


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


def png(value: int, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 20, 30)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def samples(count: int) -> list[Found]:
    return [(("cat", "dog")[i % 2], png(i)) for i in range(count)]


def write_shards(path: Path, found: list[Found], label: Callable = lambda i, name: {"cls": name}) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path)) as writer:
        for i, (name, data) in enumerate(found):
            writer.write({"__key__": f"{i:04d}", "png": data, **label(i, name)})


def write_parquet(path: Path, found: list[Found], names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": data, "path": None} for _, data in found], "label": [name for name, _ in found]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    datasets.Dataset.from_dict(columns, features).to_parquet(path)


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def store(kind: str, root: Path, found: list[Found]) -> str:
    """`found` in a file of `kind`, without splits."""
    path = root / f"all.{kind.replace('shards', 'tar')}"
    if kind == "shards":
        write_shards(path, found)
    elif kind == "parquet":
        write_parquet(path, found, sorted({name for name, _ in found}))
    else:
        for i, (_, data) in enumerate(found):
            (root / f"{i:04d}.png").write_bytes(data)
        write_csv(path, [(f"{i:04d}.png", name) for i, (name, _) in enumerate(found)])
    return str(path)


def content(images: Source) -> list[tuple[str, bytes]]:
    found = [images.read(i) for i in range(len(images))]
    return [(images.classes[sample.target], sample.image.tobytes()) for sample in found]


@pytest.fixture(scope="module")
def stored(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`photos`, with their splits, as each kind."""
    root = tmp_path_factory.mktemp("stored")
    rows: list[tuple[str, ...]] = [("split", "class", "file")]
    for split, word in (("train", "train"), ("val", "validation")):
        folder = open_split(photos, split)
        found = [
            (folder.classes[label], (photos / file).read_bytes())
            for label, file in zip(folder.targets, folder.files, strict=True)
        ]
        half = len(found) // 2
        write_shards(root / f"shards/pets-{word}-0000.tar", found[:half])
        write_shards(root / f"shards/pets-{word}-0001.tar", found[half:])
        write_parquet(root / f"parquet/data/{word}-00000-of-00001.parquet", found, folder.classes)
        rows += [(word, folder.classes[y], str(photos / f)) for y, f in zip(folder.targets, folder.files, strict=True)]
    write_csv(root / "list.csv", rows)
    return {"shards": str(root / "shards"), "parquet": str(root / "parquet"), "csv": str(root / "list.csv")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_same_images_as_the_folder(stored: dict[str, str], photos: Path, kind: str, split: str):
    images, folder = open_split(stored[kind], split), open_split(photos, split)
    assert images.targets == folder.targets
    assert images.classes == folder.classes
    assert images.names == folder.names
    assert content(images) == content(folder)
    if split == "val":
        assert content(open_evaluation(stored[kind])) == content(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_made_where_there_is_none(tmp_path: Path, kind: str):
    data = store(kind, tmp_path, samples(60))
    train, val = open_split(data, "train"), open_split(data, "val")
    assert 0 < len(val) < 15
    assert len(train) + len(val) == 60
    assert sorted(content(train) + content(val)) == sorted(content(open_evaluation(data)))
    assert sorted(content(open_evaluation(data))) == sorted(
        (name, Image.open(io.BytesIO(file)).tobytes()) for name, file in samples(60)
    )
    assert content(open_split(data, "val")) == content(val)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_read_alike_and_name_the_bad(tmp_path: Path, kind: str):
    found = samples(60)
    found[7], found[30] = ("dog", b"no image"), ("cat", b"")
    images = pickle.loads(pickle.dumps(open_evaluation(store(kind, tmp_path, found))))  # as workers that do not fork
    batches = {}
    for workers in (0, 2):
        prepared = Prepared(images, noisy, replace_bad=True)
        loader = make_loader(prepared, EpochOrder(len(images), batch_size=12, shuffle=True), workers=workers)
        batches[workers] = list(loader)
    for one, two in zip(*batches.values(), strict=True):
        assert one.images.equal(two.images)
        assert one.targets.equal(two.targets)
        assert one.skipped == two.skipped
    skipped = " ".join(str(skipped) for batch in batches[2] for skipped in batch.skipped)
    place = {"shards": "all.tar/0007.png", "parquet": "all.parquet/rows/7", "csv": "0007.png"}[kind]
    assert f"{place}: not an image" in skipped
    assert "empty file" in skipped


def noisy(sample: Sample) -> Sample:
    return Sample(np.random.rand() + to_tensor(sample.image), sample.target)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_that_teach_nothing_say_so(tmp_path: Path, kind: str):
    one = store(kind, tmp_path, [("cat", png(i)) for i in range(40)])
    with pytest.raises(UserError, match="single class"):
        open_split(one, "train")
    assert len(open_evaluation(one)) == 40
    missing = {"shards": "no such folder or tar", "parquet": "no such file", "csv": "No such file"}[kind]
    with pytest.raises(UserError, match=missing):
        open_split(one.replace("all.", "none."), "train")


# shards


def test_keys_are_those_of_webdataset(tmp_path: Path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, key in enumerate(("x/1", "x/2", "y.z/1")):
            writer.write({"__key__": key, "seg.png": png(99), "jpg": png(i), "cls": i, "json": {"label": 7 - i}})
    theirs = [s["jpg"] for s in wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False)]
    images = open_evaluation(str(tmp_path))
    assert [file for _, file in content(images)] == [Image.open(io.BytesIO(data)).tobytes() for data in theirs]
    assert images.classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (lambda i, name: {"cls": i % 11}, [str(i) for i in range(11)]),
        (lambda i, name: {"json": {"label": f" {name}\n"}}, ["cat", "dog"]),
        (lambda i, name: {"json": json.dumps({"cls": i % 2}).encode()}, ["0", "1"]),
        (lambda i, name: {"cls": -1 if i % 3 else name}, ["cat", "dog"]),
        (lambda i, name: {"json": {"label": None if i % 3 else name}}, ["cat", "dog"]),
    ],
    ids=["numbers", "json name", "json number", "-1 for none", "null for none"],
)
def test_labels_of_shards(tmp_path: Path, label: Callable, classes: list[str]):
    write_shards(tmp_path / "a.tar", samples(60), label)
    assert open_split(str(tmp_path / "a.tar"), "train").classes == classes


def test_listed_classes_name_the_numbers(tmp_path: Path):
    write_shards(tmp_path / "train/0.tar", samples(20), lambda i, name: {"cls": i % 2})
    write_shards(tmp_path / "val/0.tar", samples(4), lambda i, name: {"cls": name})
    (tmp_path / "classes.txt").write_text("dog\ncat\nn01440764\n")
    train, val = open_split(str(tmp_path), "train"), open_split(str(tmp_path), "val")
    assert train.classes == val.classes == ["dog", "cat", "n01440764"]
    assert train.names[2] == "tench"
    assert train.targets[:4] == [0, 1, 0, 1]
    assert val.targets == [1, 0, 1, 0]
    (tmp_path / "classes.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"classes\.txt: label 1 is none of the 1 classes"):
        open_split(str(tmp_path), "train")


def test_patterns(tmp_path: Path):
    for i in range(12):
        write_shards(tmp_path / f"a-{i:02d}.tar", samples(3))
    write_shards(tmp_path / "b.tar", samples(3))
    for pattern, count in (
        ("a-{00..11}.tar", 12),
        ("a-{08..10}.tar", 3),
        ("{a-*,b}.tar", 13),
        ("{a-01.tar,a-02.tar}", 2),
    ):
        assert len(open_evaluation(str(tmp_path / pattern))) == 3 * count
    images = open_evaluation(str(tmp_path / "a-{09..11}.tar"))
    assert len(images) == 9
    assert images.read(8).image.getpixel((0, 0)) == (2, 20, 30)
    with pytest.raises(UserError, match=r"a-12\.tar: no such tar"):
        open_split(str(tmp_path / "a-{11..13}.tar"), "train")


def test_training_shards_alone_are_split_and_others_beside_left_out(tmp_path: Path):
    write_shards(tmp_path / "train-0.tar", samples(40))
    write_shards(tmp_path / "extra-0.tar", samples(40))
    assert sum(len(open_split(str(tmp_path), split)) for split in ("train", "val")) == 40


def test_a_shard_written_anew_is_read_anew(tmp_path: Path):
    for count in (4, 6):
        write_shards(tmp_path / "a.tar", samples(count))
        assert len(open_evaluation(str(tmp_path))) == count


def test_class_folders_stay_class_folders(photos: Path, tmp_path: Path):
    """Also with annotations beside the images, in a tar, and with a tar or a table among them."""
    tree = tmp_path / "photos"
    for folder in ("cat", "dog"):
        (tree / folder).mkdir(parents=True)
        for i in range(20):
            (tree / folder / f"{i}.png").write_bytes(png(i))
            (tree / folder / f"{i}.json").write_text('{"label": 3}')
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tree, arcname=".")
    write_shards(tree / "left.tar", samples(3))
    write_parquet(tree / "left.parquet", samples(3), ["cat", "dog"])
    for data in (tree, tmp_path / "photos.tar"):
        assert content(open_split(str(data), "train")) == content(scan_folders(str(data)).split("train"))
        assert len(open_evaluation(str(data))) == 40
        assert open_evaluation(str(data)).classes == ["cat", "dog"]
    assert content(open_split(str(photos), "val")) == content(scan_folders(str(photos)).split("val"))


def test_bad_shards_have_their_line(tmp_path: Path):
    for name, label, reason in (
        ("list", {"json": {"label": [1]}}, r"0000\.json: holds no label \(\[1\] is neither"),
        ("text", {"json": b"{"}, r"0000\.json: holds no label"),
        ("none", {"txt": "a cat"}, "no labelled images"),
    ):
        write_shards(tmp_path / name / "0.tar", samples(4), lambda i, _, label=label: label)
        with pytest.raises(UserError, match=reason) as caught:
            open_split(str(tmp_path / name), "train")
        assert "\n" not in str(caught.value)
    write_shards(tmp_path / "whole.tar", samples(40))
    for size in (0, 600, 20000):
        (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:size])
        with pytest.raises(UserError, match=r"cut\.tar: not a whole, uncompressed tar"):
            open_split(str(tmp_path / "cut.tar"), "train")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "whole.tar")
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        open_split(str(tmp_path / "packed.tar"), "train")


def test_a_shard_that_goes_away_is_a_bad_image(tmp_path: Path):
    write_shards(tmp_path / "a.tar", samples(4))
    images = open_evaluation(str(tmp_path))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadImage, match=r"a\.tar/0001\.png: No such file"):
        images.read(1)


def test_labels_of_shards_by_the_rule_of_all(tmp_path: Path):
    """Whole numbers in any type; a sample without a label, or without an image, is named."""
    kinds = [{"label": 2.0}, {"label": "2"}, {"cls": True}, {"label": 1}, {"label": None}, {"label": "1.0"}]
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, record in enumerate(kinds):
            writer.write({"__key__": f"{i}", "png": png(i), "json": record})
        writer.write({"__key__": "x", "txt": "a cat", "cls": 1})
    data = open_data(tmp_path / "a.tar")
    assert data.whole.classes == ["1", "2"] and data.whole.targets == [1, 1, 0, 0, 0]
    said = "; ".join(map(str, data.left_out))
    assert "a.tar/4.png: sample without a label" in said and "a.tar/x.cls: sample without an image" in said


def test_images_of_any_ending_in_shards(tmp_path: Path):
    """Also by their content alone; what is called otherwise ("seg.png") is not the image."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (7, 20, 30)).save(buffer, "BMP")
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i, ending in enumerate(("bmp", "img", "picture")):
            writer.write(
                {"__key__": f"{i}", "seg.png": png(99), "bin": b"no image", ending: buffer.getvalue(), "cls": i}
            )
    images = open_evaluation(tmp_path / "a.tar")
    assert [images.read(i).image.getpixel((0, 0)) for i in range(3)] == [(7, 20, 30)] * 3


def test_files_of_one_name_in_two_shards_are_told_apart(tmp_path: Path):
    for name in ("a", "b"):
        write_shards(tmp_path / f"{name}.tar", samples(3))
    assert open_evaluation(tmp_path).files[1:5] == [
        "a.tar/0001.png",
        "a.tar/0002.png",
        "b.tar/0000.png",
        "b.tar/0001.png",
    ]
    assert open_evaluation(tmp_path / "a.tar").files[1] == "0001.png"
    for name in ("train", "val"):
        write_shards(tmp_path / "splits" / f"{name}.tar", samples(3))
    assert open_split(tmp_path / "splits", "train").files == open_split(tmp_path / "splits", "val").files


# tables


@pytest.mark.parametrize(
    "text",
    [
        "a b/1.png,tench",
        "Image,Label\na b/1.png,tench",
        "class, filename\r\ntench, a b/1.png",
        'label,id,path\ntench,"5,6",a b/1.png',
    ],
    ids=["none", "capitals", "spaces", "more columns"],
)
def test_csv_with_and_without_header(tmp_path: Path, text: str):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "1.png").write_bytes(png(9))
    (tmp_path / "x.csv").write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    images = open_evaluation(str(tmp_path / "x.csv"))
    assert images.classes == ["tench"]
    assert len(images) == 1
    assert images.read(0).image.getpixel((0, 0)) == (9, 20, 30)


def test_csv_labels_are_names_and_missing_files_bad_images(tmp_path: Path):
    write_csv(tmp_path / "x.csv", [(f"{i}.png", str(i)) for i in range(11)])
    (tmp_path / "5.png").write_bytes(png(5))
    images = open_evaluation(str(tmp_path / "x.csv"))
    assert images.classes == [str(i) for i in range(11)]  # numbers in their order, as in every kind of data
    with pytest.raises(BadImage, match=r"3\.png: No such file"):
        images.read(3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "path;label\na b,c/1.png;cat\na b,c/2.png;dog"),
        ("x.csv", "path\tlabel\na b,c/1.png\tcat\na b,c/2.png\tdog"),
        ("x.tsv", "a b,c/1.png\tcat\na b,c/2.png\tdog"),
        ("x.txt", "file|note, longer|class\na b,c/1.png|x,y|cat\na b,c/2.png|z|dog"),
        ("x.txt", "a b,c/1.png cat\na b,c/2.png   dog"),
        ("x.txt", "a b,c/1 cat\na b,c/2 dog"),
        ("x.CSV", 'path,label\n"a b,c/1.png",cat\n"a b,c/2.png",dog'),
        ("x.csv", 'Image Path,Class-Name\n"a b,c\\1.png",cat\n".\\a b,c\\2.png",dog'),
        ("x.csv", "thumbnail;image;label\nnone.png;a b,c/1.png;cat\nnone.png;a b,c/2.png;dog"),
    ],
    ids="semicolon tab tsv bar spaces no-ending quoted windows two-images".split(),
)
def test_tables_as_other_programs_write_them(tmp_path: Path, name: str, text: str):
    (tmp_path / "a b,c").mkdir()
    for i in (1, 2):
        (tmp_path / "a b,c" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "a b,c" / f"{i}").write_bytes(png(i))
    (tmp_path / name).write_text(text)
    images = open_evaluation(tmp_path / name)
    assert images.classes == ["cat", "dog"] and images.targets == [0, 1]
    assert [images.read(i).image.getpixel((0, 0))[0] for i in range(2)] == [1, 2]
    assert not any("\\" in file for file in images.files)


def test_a_backslash_in_a_name_stays(tmp_path: Path):
    (tmp_path / "a\\1.png").write_bytes(png(1))
    write_csv(tmp_path / "x.csv", [("a\\1.png", "cat")])
    assert open_evaluation(tmp_path / "x.csv").read(0).image.getpixel((0, 0))[0] == 1


@pytest.mark.parametrize("path", ["images/1.png", "C:\\data\\1.png", "/nowhere/1.png"])
def test_a_list_of_which_nothing_is_there_is_refused(tmp_path: Path, path: str):
    write_csv(tmp_path / "x.csv", [("path", "label"), (path, "cat"), ("2.png", "dog")])
    with pytest.raises(
        UserError, match=r"none of the 2 images is there \(first: .*1\.png\); paths start at /.*, where"
    ):
        open_data(tmp_path / "x.csv")
    (tmp_path / "2.png").write_bytes(png(1))
    assert len(open_evaluation(tmp_path / "x.csv")) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("picture_of,species\na.png,cat\nb.png,dog\n", "no column path or file or image or filename; found picture_of"),
        ("path,species\na.png,cat\n", "no column label or class; found path, species;"),
        ("pth;kind\na.png;cat\n", "no column path or file or image or filename; found pth, kind;"),
        ("a.png,cat,train\n", "no column path or file or image or filename; found a.png, cat, train;"),
        ("path,label\n\na.png,cat\nb.png\n", "row 4 is 'b.png', not path,label;"),
        ("a.png,cat\nb.png,\n", "row 2 is 'b.png,', not path,label;"),
        ("a.png,cat\nb,c.png,dog\n", "row 2 is 'b,c.png,dog', not path,label;"),
        ("path,label,split\na.png,cat,trian\n", "row 2 is 'a.png,cat,trian', not path,label,split with train or val"),
        ("path,label\n", "no images for train"),
        ("", "no column path or file or image or filename; found none;"),
        ("a.png,caf\xe9\n", "not a CSV in UTF-8"),
    ],
)
def test_bad_csv_has_its_line(tmp_path: Path, text: str, reason: str):
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        open_split(str(tmp_path / "x.csv"), "train")
    assert f"x.csv: {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


# parquet and the hub


@pytest.mark.parametrize(
    ("images", "labels", "classes", "count"),
    [
        ("struct", [3, 10, 3, None], ["3", "10"], 3),
        ("struct", ["cat", "dog", "cat", "dog"], ["cat", "dog"], 4),
        ("binary", [1, 0, -1, 1], ["0", "1"], 3),
    ],
)
def test_parquet_not_of_datasets(tmp_path: Path, images: str, labels: list, classes: list[str], count: int):
    files = [png(i) for i in range(4)]
    column = files if images == "binary" else [{"bytes": data, "path": "x.png"} for data in files]
    pq.write_table(pa.table({"id": [0] * 4, "jpg": column, "fine_label": labels}), tmp_path / "some [1].parquet")
    found = open_evaluation(str(tmp_path / "some [1].parquet"))
    assert found.classes == classes
    assert len(found) == count
    assert [found.read(i).image.getpixel((0, 0))[0] for i in range(count)] == [
        i for i, label in enumerate(labels) if label not in (None, -1)
    ]


def test_parquet_that_only_points_to_files(tmp_path: Path):
    (tmp_path / "1.png").write_bytes(png(5))
    paths = [{"bytes": None, "path": str(tmp_path / name)} for name in ("1.png", "2.png")]
    pq.write_table(
        pa.table({"image": pa.array(paths, pa.struct({"bytes": pa.binary(), "path": pa.string()})), "label": [0, 1]}),
        tmp_path / "x.parquet",
    )
    images = open_evaluation(str(tmp_path))
    assert images.read(0).image.getpixel((0, 0)) == (5, 20, 30)
    with pytest.raises(BadImage, match=r"2\.png: No such file"):
        images.read(1)


def test_parquet_labels_by_another_name_and_orientation_as_everywhere(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "PNG", exif=exif)
    features = datasets.Features(
        coarse=datasets.ClassLabel(names=["animal", "plant"]), note=datasets.Value("string"), photo=datasets.Image()
    )
    columns = {"coarse": [1], "note": ["x"], "photo": [{"bytes": buffer.getvalue(), "path": None}]}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "x.parquet")
    images = open_evaluation(str(tmp_path / "x.parquet"))
    assert images.classes == ["animal", "plant"]
    assert images.targets == [1]
    assert images.read(0).image.size == (10, 20)


@pytest.mark.parametrize(
    ("labels", "targets", "classes"),
    [
        (pa.array([2.0, 1.0, None, 2.0], pa.float32()), [1, 0, 1], ["1", "2"]),
        (pa.array([1.0, 0.0, -1.0, float("nan")], pa.float64()), [1, 0], ["0", "1"]),
        (pa.array([True, False, True, None]), [1, 0, 1], ["0", "1"]),
        (pa.array(["10", "9", "10", "9"]), [1, 0, 1, 0], ["9", "10"]),
        (pa.array([3, 1, 255, 1], pa.uint8()), [1, 0, 2, 0], ["1", "3", "255"]),
    ],
    ids="float double bool text uint8".split(),
)
def test_labels_of_parquet_in_any_type(tmp_path: Path, labels: pa.Array, targets: list[int], classes: list[str]):
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": labels}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    data = open_data(tmp_path / "x.parquet")
    assert (data.whole.targets, data.whole.classes) == (targets, classes)
    assert len(data.left_out) == (len(targets) < 4)


def test_labels_of_parquet_that_are_measurements_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"image": [png(1)] * 2, "label": [0.5, 1.0]}), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"x\.parquet: a label that is none \(0\.5 is neither a whole number nor a name"
    ):
        open_data(tmp_path / "x.parquet")


@pytest.mark.parametrize("names", [("thumbnail", "image"), ("preview", "img"), ("mask", "jpg"), ("first", "second")])
def test_the_column_called_image_is_taken(tmp_path: Path, names: tuple[str, str]):
    columns = {name: [{"bytes": png(i + 5 * k), "path": None} for i in range(2)] for k, name in enumerate(names)}
    features = datasets.Features({name: datasets.Image() for name in names} | {"label": datasets.Value("int64")})
    datasets.Dataset.from_dict(columns | {"label": [0, 1]}, features).to_parquet(tmp_path / "x.parquet")
    data = open_data(tmp_path / "x.parquet")
    second = names[1] != "second"
    assert data.evaluation().read(1).image.getpixel((0, 0))[0] == (6 if second else 1)
    assert [skipped.name for skipped in data.left_out] == [names[0] if second else names[1]]


def test_folders_of_save_to_disk(tmp_path: Path):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(30)], "label": [i % 2 for i in range(30)]}
    part = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict(train=part, test=part.select(range(4))).save_to_disk(tmp_path / "both")
    part.save_to_disk(tmp_path / "one")
    both, one = open_data(tmp_path / "both"), open_data(tmp_path / "one")
    assert (len(both.split("train")), len(both.split("val")), both.whole.classes) == (30, 4, ["cat", "dog"])
    assert both.split("val").files == [f"test/{i}" for i in range(4)]
    assert one.made and (len(one.split("train")), len(one.split("val"))) == (26, 4)
    assert one.evaluation().read(9).image.getpixel((0, 0))[0] == 9
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="one: .*; fetch or write it again"):
        open_data(tmp_path / "one")


def test_bad_parquet_has_its_line(tmp_path: Path):
    pq.write_table(pa.table({"url": ["x"], "label": [0]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"], "score": [0.5]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("no parquet")
    for name, reason in (
        ("a", "no column of images; found url, label;"),
        ("b", "no column of numbers or texts named label or labels or class or fine_label or cls; found image, score;"),
        ("c", "Parquet magic bytes not found"),
    ):
        with pytest.raises(UserError) as caught:
            open_split(str(tmp_path / f"{name}.parquet"), "train")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_hub_data_set_by_name(monkeypatch: pytest.MonkeyPatch):
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=["a", "b"]))
    part = datasets.Dataset.from_dict(
        {"img": [{"bytes": png(1), "path": None}] * 3, "fine_label": [0, 1, -1]}, features
    )
    asked = {}

    def load(path: str, name: str | None) -> datasets.DatasetDict:
        asked.update(path=path, name=name)
        return datasets.DatasetDict(train=part, test=part, validation=part.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, val = open_split("hf:someone/photos:small", "train"), open_split("hf:someone/photos:small", "val")
    assert asked == {"path": "someone/photos", "name": "small"}
    assert train.targets == [0, 1]
    assert val.targets == [1]
    assert train.classes == ["a", "b"]
    assert train.files == ["train/0", "train/1"]
    assert val.files == ["validation/0"]


def test_hub_that_cannot_be_reached_names_the_remedy():
    with pytest.raises(
        UserError, match=r"^hf:someone/photos: .*reach.*; give hf:OWNER/NAME.* parquet files$"
    ) as caught:
        open_split("hf:someone/photos", "train")
    assert "\n" not in str(caught.value)


def test_without_datasets_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parquet(tmp_path / "x.parquet", samples(2), ["cat", "dog"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"datasets is not installed; pip install 'glmix\[train\]'"):
        open_split(str(tmp_path / "x.parquet"), "train")
