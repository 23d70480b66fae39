"""Scenes: repeatable, exact in boxes and masks, and with nothing about the class in their colours."""

import json
from pathlib import Path

import numpy as np
import pytest

from glmix import UserError
from glmix.data.samples import Source
from glmix.data.scenes import CLASSES, Scene, SceneSet, make_scene, scene_split, write_scenes
from glmix.data.sources import open_data, open_split

FIELDS = ("image", "label", "boxes", "labels", "instances", "semantic")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(7, index) for index in range(64)]


def test_depends_on_seed_and_index_alone(scenes: list[Scene]) -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    again = make_scene(7, 3)
    assert (np.random.get_state()[1] == before).all()
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(again, field), getattr(scenes[3], field))
    assert (make_scene(8, 3).image != again.image).any()
    assert (scenes[4].image != again.image).any()


def test_another_size_is_the_same_scene() -> None:
    small, large = make_scene(7, 5, 48), make_scene(7, 5, 96)
    assert small.image.shape == (48, 48, 3)
    np.testing.assert_array_equal(small.labels, large.labels)
    assert np.abs(2 * small.boxes - large.boxes).max() <= 4


def test_boxes_are_tight(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.boxes.shape == (len(scene.labels), 4)
        assert scene.boxes.dtype == np.float32
        assert set(np.unique(scene.instances)) == set(range(len(scene.labels) + 1))
        for number, (x0, y0, x1, y1) in enumerate(scene.boxes.astype(int), 1):
            mask = scene.instances == number
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_semantic_agrees_with_instances(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.semantic.dtype == scene.instances.dtype == np.uint8
        assert ((scene.semantic == 0) == (scene.instances == 0)).all()
        for number, kind in enumerate(scene.labels, 1):
            assert (scene.semantic[scene.instances == number] == 1 + kind).all()


def test_label_is_the_largest_objects(scenes: list[Scene]) -> None:
    assert any(len(scene.labels) == 3 for scene in scenes)
    for scene in scenes:
        areas = np.bincount(scene.instances.ravel())[1:]
        assert scene.labels[0] == scene.label
        assert areas[0] > 2 * areas[1:].max(initial=0)


def test_masks_are_what_is_painted(scenes: list[Scene]) -> None:
    """Where an object and its background are each nearly of one colour, the colours alone give the mask."""
    checked = 0
    for scene in (scene for scene in scenes if len(scene.labels) == 1):
        mask, image = scene.instances == 1, scene.image.astype(float)
        inner, outer = image[mask].mean(0), image[~mask].mean(0)
        if max(image[mask].std(0).max(), image[~mask].std(0).max()) < 25:
            nearer = np.linalg.norm(image - inner, axis=2) < np.linalg.norm(image - outer, axis=2)
            assert (nearer != mask).mean() < 0.005
            checked += 1
    assert checked > 2


def test_labels_are_balanced_and_the_scenes_own(scenes: list[Scene]) -> None:
    images = SceneSet(64, seed=7).source()
    assert images.targets == [scene.label for scene in scenes]
    assert np.bincount(images.targets).tolist() == [8] * len(CLASSES)
    assert images.targets[:8] != images.targets[8:16]
    assert len(images) == len(images.files) == 64
    assert images.files[12] == "scene-000012"
    assert images.classes == images.names == sorted(CLASSES)
    np.testing.assert_array_equal(np.asarray(images.read(2).image), scenes[2].image)


def test_splits_share_no_scene() -> None:
    train, val = scene_split("train"), scene_split("val", count=16)
    assert (len(train), len(val)) == (4000, 16)
    assert train.pictures.seed != val.pictures.seed
    np.testing.assert_array_equal(val.pictures.scene(3).image, np.asarray(val.read(3).image))


def test_scenes_are_a_data_set_with_splits() -> None:
    data = open_data("scenes")
    for split in ("train", "val"):
        whole = scene_split(split)
        assert data.split(split).digest() == whole.digest() and data.split(split).targets == whole.targets
        assert data.split(split).read(9).image.tobytes() == whole.read(9).image.tobytes()
    assert data.evaluation().digest() == scene_split("val").digest() and not data.made


def histograms(images: Source) -> np.ndarray:
    """(n, 25): share of pixels in each eighth of each channel, and 1."""
    pixels = [np.asarray(images.read(index).image) // 32 for index in range(len(images))]
    counts = [[np.bincount(p[..., c].ravel(), minlength=8) / p[..., c].size for c in range(3)] for p in pixels]
    return np.concatenate([np.reshape(counts, (-1, 24)), np.ones((len(images), 1))], 1)


def colour_accuracy(train: Source, val: Source) -> float:
    """Accuracy on `val` of ridge regression from colour histograms to classes, fitted to `train`."""
    features, targets = histograms(train), np.eye(len(CLASSES))[train.targets]
    weights = np.linalg.solve(features.T @ features + 0.1 * np.eye(features.shape[1]), features.T @ targets)
    return float(((histograms(val) @ weights).argmax(1) == val.targets).mean())


def test_colours_tell_nothing_about_the_class() -> None:
    accuracy = colour_accuracy(scene_split("train", 600, size=48), scene_split("val", 300, size=48))
    assert accuracy < 0.2, f"{accuracy:.1%} from colours alone; chance is 12.5%"


def unpack(counts: list[int], size: list[int]) -> np.ndarray:
    """The mask of an uncompressed RLE."""
    return np.repeat(np.arange(len(counts)) % 2, counts).reshape(size, order="F")


def test_written_folder_is_a_data_set(tmp_path: Path) -> None:
    written = write_scenes(tmp_path, 48, seed=7, size=64)
    train, val = open_split(tmp_path, "train"), open_split(tmp_path, "val")
    assert tuple(train.classes) == tuple(val.classes) == CLASSES
    assert sorted(train.files + val.files) == sorted(str(path.relative_to(tmp_path)) for path in written)

    coco = json.loads((tmp_path / "annotations.json").read_text())
    scenes = [make_scene(7, index, 64) for index in range(48)]
    assert [c["name"] for c in coco["categories"]] == list(CLASSES)
    assert len(coco["annotations"]) == sum(len(scene.labels) for scene in scenes)
    for image, scene in zip(coco["images"], scenes, strict=True):
        assert Path(image["file_name"]).parent.name == CLASSES[scene.label]
        found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        for number, (annotation, box) in enumerate(zip(found, scene.boxes, strict=True), 1):
            mask = scene.instances == number
            assert (unpack(**annotation["segmentation"]) == mask).all()
            assert annotation["area"] == mask.sum()
            assert annotation["category_id"] == 1 + scene.labels[number - 1]
            x, y, width, height = annotation["bbox"]
            assert [x, y, x + width, y + height] == box.tolist()


def test_a_used_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "1.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"already holds other files \(such as holiday/1\.jpg\); give a new"):
        write_scenes(tmp_path, 4, size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday"]
    out = tmp_path / "scenes"
    assert write_scenes(out, 16, size=32) == write_scenes(out, 16, size=32)  # the same again mends a cut one
    with pytest.raises(UserError, match="already holds other files"):
        write_scenes(out, 8, size=32)
