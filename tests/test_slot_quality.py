"""Regions and their measures on partitions whose figures are known, and the command on both kinds of data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_commands import mistake, output

from glmix.data.scenes import make_scene
from glmix.data.voc import VOID, open_masks
from glmix.slots.quality import best_iou, boundary_recall, bounded, measure, overlaps, purity
from glmix.slots.regions import boundaries, merge_slots, square_patches, strongest_slots

HALVES = np.repeat([[0, 1]], 8, 0).repeat(4, 1)  # 8 x 8, left and right


def test_squares_partition_any_size() -> None:
    labels = square_patches((97, 131), (7, 7))
    assert labels.shape == (97, 131) and len(np.unique(labels)) == 49
    areas = np.bincount(labels.ravel())
    assert areas.max() <= 14 * 19 and areas.min() >= 13 * 18
    assert labels[0, 0] == 0 and labels[0, -1] == 6 and labels[-1, 0] == 42


def test_boundaries() -> None:
    edge = boundaries(HALVES)
    assert edge[:, 3].all() and edge.sum() == 8
    assert boundaries(HALVES, 3)[:, 2:5].all() and boundaries(HALVES, 3).sum() == 24
    assert not boundaries(np.zeros((4, 4), int)).any()


def test_strongest_slot_after_enlarging() -> None:
    assignment = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])
    assert strongest_slots(assignment).tolist() == [[0, 1]]
    labels = strongest_slots(assignment, (2, 8))
    assert labels.tolist() == [[0] * 4 + [1] * 4] * 2


def test_merging_joins_what_overlaps() -> None:
    """Slots 0 and 1 share their half softly, slot 2 has the other half alone; slot 3 is strongest nowhere."""
    assignment = torch.zeros(4, 8, 8)
    assignment[0, :, :4], assignment[1, :, :4] = 0.5, 0.4
    assignment[0, :4, :4], assignment[1, :4, :4] = 0.4, 0.5
    assignment[2, :, 4:] = 0.9
    assignment[3] = 0.05
    labels = strongest_slots(assignment)
    assert sorted(np.unique(labels)) == [0, 1, 2]
    merged = merge_slots(assignment, labels, 0.5)
    assert len(np.unique(merged)) == 2 and len(np.unique(merged[:, :4])) == 1 and (merged[:, 4:] == 2).all()
    assert (merge_slots(assignment, labels, 1.0) == labels).all()
    assert len(np.unique(merge_slots(assignment, labels, 0.0))) == 1


def test_a_perfect_partition() -> None:
    assert measure(HALVES, HALVES) == {
        "best_iou": 1,
        "boundary_recall": 1,
        "purity": 1,
        "regions": 2,
        "boundary": 0.125,
    }


def test_known_figures() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 5:] = 1  # 24 pixels, all in the right half of 32
    overlap = overlaps(HALVES, mask)
    assert overlap.tolist() == [[32, 0], [8, 24]]
    assert best_iou(overlap) == 24 / 32
    assert purity(overlap) == (32 + 24) / 64
    assert boundary_recall(HALVES, mask) == 1  # one pixel away
    mask[:] = 0
    mask[:, 7] = 1
    assert boundary_recall(HALVES, mask) == 0  # three pixels away
    assert np.isnan(best_iou(overlaps(HALVES, np.zeros((8, 8), np.uint8))))
    assert np.isnan(boundary_recall(HALVES, np.zeros((8, 8), np.uint8)))


def test_void_is_neither_object_nor_background() -> None:
    mask = HALVES.astype(np.uint8)
    mask[:4, 4:] = VOID
    overlap = overlaps(HALVES, mask)
    assert overlap.tolist() == [[32, 0], [0, 16]]
    assert best_iou(overlap) == 1 and purity(overlap) == 1


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four scenes in PASCAL VOC's layout, three of them in the list of the split val."""
    root = tmp_path_factory.mktemp("voc")
    for folder in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (root / "VOC2012" / folder).mkdir(parents=True)
    for index in range(4):
        scene = make_scene(5, index, 80)
        Image.fromarray(scene.image).save(root / "VOC2012" / "JPEGImages" / f"{index}.jpg", quality=95)
        Image.fromarray(scene.instances).save(root / "VOC2012" / "SegmentationObject" / f"{index}.png")
    (root / "VOC2012/ImageSets/Segmentation/val.txt").write_text("0\n1\n3\n")
    return root


def test_masks_of_voc(voc: Path) -> None:
    images = open_masks(str(voc))
    assert len(images) == 3
    image, mask, _ = images.read(2)
    assert image.size == (80, 80)
    np.testing.assert_array_equal(mask, make_scene(5, 3, 80).instances)


def test_command_on_voc_and_scenes(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figure = tmp_path / "quality.svg"
    out = output(capsys, "slots", "--data", voc, "--figure", figure, "--json")
    found = json.loads(out)
    assert found["images"] == 3 and not found["skipped"]
    assert list(found["measures"])[:3] == ["squares", "slic", "stages.0.blocks.0"] and len(found["measures"]) == 11
    for row in found["measures"].values():
        assert 0 < row["best_iou"] < 1 and 0 < row["boundary_recall"] <= 1 and 0.5 < row["purity"] <= 1
    assert "<svg" in figure.read_text()
    text = output(capsys, "slots", "--data", "scenes", "--limit", 2, "--random-weights")
    assert text.startswith("2 images") and "best-match IoU" in text and "stages.2.blocks.5" in text
    assert text != output(capsys, "slots", "--data", "scenes", "--limit", 2)


def test_one_slot_has_purity_of_the_background(voc: Path, capsys: pytest.CaptureFixture) -> None:
    """With a single slot every block is one region: figures that can be had from the masks alone."""
    out = output(capsys, "slots", "--data", voc, "--slot-grid", "[1,1]", "--json")
    scenes = [make_scene(5, i, 80).instances for i in (0, 1, 3)]
    background = np.mean([(s == 0).mean() for s in scenes])
    measures = json.loads(out)["measures"]
    assert all(measures[name]["purity"] == pytest.approx(background) for name in measures if name != "slic")
    assert all(measures[name]["boundary_recall"] == 0 for name in measures if name != "slic")


def test_other_forms_of_the_command(voc: Path, capsys: pytest.CaptureFixture) -> None:
    """What `glmix eval --task slots` said, it says still; and it has no use for what only the one or the other takes."""
    options = ["--data", voc, "--slot-grid", "[2,3]", "--limit", 2, "--json"]
    found = json.loads(output(capsys, "slots", *options))
    assert found["images"] == 2 and found["measures"]["squares"]["regions"] == 6
    assert json.loads(output(capsys, "eval", "--task", "slots", *options)) == found
    assert "classify or slots" in mistake(capsys, "eval", "--task", "slot", "--data", voc)
    assert "--figure" in mistake(capsys, "eval", "--data", voc, "--figure", "x.png")
    assert "--shuffle-slots" in mistake(capsys, "eval", "--task", "slots", "--data", voc, "--shuffle-slots")


def test_a_limit_takes_images_from_all_over_the_data(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "voc"
    shutil.copytree(voc / "VOC2012", root)
    shutil.rmtree(root / "ImageSets")
    for name in ("0", "2"):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(b"")
    found = json.loads(output(capsys, "slots", "--data", root, "--limit", 2, "--json"))
    assert found["images"] == 2 and found["skipped"] == []
    found = json.loads(output(capsys, "slots", "--data", root, "--json"))
    assert found["images"] == 2
    first, second = found["skipped"]
    assert first == {"name": str(root / "JPEGImages" / "0.jpg"), "reason": "empty file"}
    assert second["name"].endswith("2.jpg")
    assert f"{first['name']}: empty file" in output(capsys, "slots", "--data", root)


def test_a_figure_is_kept_until_there_is_another(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figure = tmp_path / "quality.png"
    figure.write_bytes(b"of last week")
    broken = tmp_path / "broken"
    shutil.copytree(voc, broken)
    for path in (broken / "VOC2012" / "JPEGImages").iterdir():
        path.write_bytes(b"")
    options = ["slots", "--figure", figure, "--data"]
    for words in (["none"], [tmp_path], [broken], [voc, "--slot-grid", "[0,1]"], [voc, "--checkpoint", "none.pth"]):
        mistake(capsys, *options, *words)
        assert figure.read_bytes() == b"of last week", words
    output(capsys, *options, voc)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "quality.png"]

    other = tmp_path / "figure.xyz"
    other.write_bytes(b"mine")
    assert "xyz" in mistake(capsys, "slots", "--data", voc, "--figure", other) and other.read_bytes() == b"mine"
    assert "a folder" in mistake(capsys, "slots", "--data", voc, "--figure", broken)
    output(capsys, "slots", "--data", voc, "--figure", tmp_path / "plain")
    assert (tmp_path / "plain.png").read_bytes().startswith(b"\x89PNG")


def test_huge_masks_are_compared_smaller() -> None:
    mask = np.repeat(np.repeat(HALVES, 300, 0), 100, 1).astype(np.uint8)
    photo, smaller = bounded(Image.fromarray(mask), mask)
    assert photo.size == (341, 1024) and smaller.shape == (1024, 341) and np.unique(smaller).tolist() == [0, 1]
    assert bounded(Image.fromarray(smaller), smaller)[1] is smaller


def test_mistakes(voc: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "VOC's layout" in mistake(capsys, "slots", "--data", photos)
    assert "VOC's layout" in mistake(capsys, "slots", "--data", tmp_path / "none")
    assert "xyz" in mistake(capsys, "slots", "--data", voc, "--figure", tmp_path / "q.xyz")
    assert "--limit -3" in mistake(capsys, "slots", "--data", voc, "--limit", -3)
    assert "--shuffle-slots" in mistake(capsys, "slots", "--data", voc, "--shuffle-slots")
    broken = tmp_path / "broken"
    (broken / "JPEGImages").mkdir(parents=True)
    (broken / "SegmentationObject").mkdir()
    (broken / "SegmentationObject" / "a.png").write_bytes(b"no image")
    assert "none of 1 images" in mistake(capsys, "slots", "--data", broken)
