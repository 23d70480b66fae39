"""Masks from image labels: class maps against another implementation, spreading against explicit matrices, the measure."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import mistake, output
from PIL import Image
from pytorch_grad_cam import GradCAM, HiResCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from glmix.data.masks import IGNORED, open_maps
from glmix.data.samples import spread as spread_over
from glmix.data.scenes import CLASSES, make_scene
from glmix.models import build, create_model
from glmix.models.description import Description
from glmix.models.slot_maps import slot_maps
from glmix.models.weights import write_checkpoint
from glmix.slots.class_maps import class_maps, highest_one, linear_classifier, mean_maps
from glmix.slots.label_head import features_and_labels, fit_label_head, mean_precision
from glmix.slots.spread import Way, kmeans_maps, logits_of, logits_of_parts, spread, spread_by
from glmix.slots.weak import THRESHOLDS, Seer, count_pixels, mask_of, mean_iou, paired_interval, scores_at

SIDE = 96


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(1)
    return create_model(
        "glnet_pico", num_classes=3, dims=(32, 32, 64, 64), depths=(1, 1, 1, 1), slot_grid=(3, 4)
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def drawn_like_theirs(maps_hw: Tensor) -> np.ndarray:
    """What that package makes of a map: what is below 0 cut off, enlarged, from 0 to 1."""
    enlarged = F.interpolate(maps_hw.relu()[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
    return ((enlarged - enlarged.min()) / (enlarged.max() - enlarged.min())).numpy()


@pytest.mark.parametrize(
    ("kind", "theirs", "layer"),
    [
        ("cam", GradCAM, lambda net: net.norm),
        ("grad-cam", GradCAM, lambda net: net.stages[-2]),
        ("gradient", HiResCAM, lambda net: net.stages[-2]),
    ],
)
def test_class_maps_are_those_of_the_package_grad_cam(net, images, kind, theirs, layer) -> None:
    """Behind average pooling and one linear layer, Grad-CAM of the last features is CAM up to a factor."""
    ours = class_maps(net, images, linear_classifier(net), [2, 0], kind)
    assert ours.shape[:2] == (2, 2) and not ours.requires_grad
    for place, number in enumerate([2, 0]):
        with theirs(model=net, target_layers=[layer(net)]) as other:
            wanted = other(images.clone(), [ClassifierOutputTarget(number)] * 2)
        for one in range(2):
            np.testing.assert_allclose(drawn_like_theirs(ours[one, place]), wanted[one], atol=2e-3)


def test_a_class_map_sums_to_the_score(net, images) -> None:
    layer = linear_classifier(net)
    maps = class_maps(net, images, layer, [0, 1, 2], "cam")
    torch.testing.assert_close(maps.mean((2, 3)) + layer.bias, net(images).detach(), atol=1e-4, rtol=1e-4)


def test_mirroring_an_image_mirrors_its_mean_map(net) -> None:
    seen = {"preparation": described_for(net), "classifier": linear_classifier(net), "classes": [1]}
    photo = Image.fromarray(make_scene(3, 0, SIDE).image)
    maps = mean_maps(net, photo, scales=[0.5, 1.0], **seen)
    assert maps.shape == (1, SIDE // 4, SIDE // 4)
    mirrored = mean_maps(net, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), scales=[0.5, 1.0], **seen)
    torch.testing.assert_close(mirrored.flip(2), maps)
    top = highest_one(torch.cat([maps, torch.zeros_like(maps)])).amax((1, 2))
    assert top.tolist() == [1, 0]


def test_scores_go_from_the_lowest_place_to_the_highest() -> None:
    """So a map that has a little everywhere, as one that was spread, has a background too; one of nothing else, none."""
    maps = torch.rand(2, 6, 5)
    scores = scores_at(maps, (6, 5))
    assert scores.min((1, 2)).tolist() == [0, 0] and scores.max((1, 2)).tolist() == [1, 1]
    np.testing.assert_allclose(scores_at(3 * maps + 7, (6, 5)), scores, atol=1e-5)
    assert not scores_at(torch.full((1, 4, 4), 0.7), (8, 8)).any()


def described_for(net: nn.Module):
    from glmix.data.prepare import Preparation

    return Preparation(size=(SIDE, SIDE))


def test_spreading_is_dispatching_times_clustering(net, images) -> None:
    block = slot_maps(net, images)[0]
    clustering, dispatching = (weights[0].flatten(1) for weights in (block.clustering, block.assignment))
    affinity = dispatching.T @ clustering  # (N, N), which `spread` never holds
    torch.testing.assert_close(affinity.sum(1), torch.ones(len(affinity)))
    assert torch.linalg.matrix_rank(affinity) <= block.slots == 12
    maps = torch.rand(3, *block.logits.shape[2:])
    x = maps.flatten(1)
    for steps in (1, 3):
        wanted = (x @ torch.linalg.matrix_power(affinity, steps).T).view_as(maps)
        torch.testing.assert_close(spread(maps, block.logits[0], steps), wanted)
    half = 0.5 * x @ affinity.T + 0.5 * x
    torch.testing.assert_close(spread(maps, block.logits[0], 1, 0.5), half.view_as(maps))
    torch.testing.assert_close(spread(maps, block.logits[0], 2, 0.0), maps)
    level = torch.full_like(maps, 0.7)
    torch.testing.assert_close(spread(level, block.logits[0], 4), level)


def test_a_way_goes_through_its_blocks_in_order(net, images) -> None:
    blocks = logits_of(slot_maps(net, images))
    first, deep = "stages.0.blocks.0", "stages.2.blocks.0"
    maps = torch.rand(2, 6, 6)
    assert spread_by(maps, blocks, Way()) is maps
    found = spread_by(maps, blocks, Way((deep, first)))
    assert found.shape == (2, *blocks[first].shape[1:])
    torch.testing.assert_close(found, spread(spread(maps, blocks[deep]), blocks[first]))
    assert not torch.allclose(found, spread_by(maps, blocks, Way((first,))))


def test_through_a_partition_each_part_gets_its_mean() -> None:
    parts = np.repeat([[0, 0, 0, 1]], 4, 0)
    maps = torch.arange(16.0).view(1, 4, 4)
    found = spread(maps, logits_of_parts(parts))[0]
    torch.testing.assert_close(found[:, 3], torch.full((4,), maps[0, :, 3].mean().item()))
    torch.testing.assert_close(found[:, :3], torch.full((4, 3), maps[0, :, :3].mean().item()))


def test_kmeans_makes_parts_that_fit_ever_better(net, images) -> None:
    before = slot_maps(net, images)
    for rounds in (1, 10):
        for block, own in zip(kmeans_maps(net, images, rounds), before, strict=True):
            assert (block.assignment.max(1).values > 0.999).all() and block.logits.shape == own.logits.shape
            if rounds == 1:  # the parts of the strongest slots
                assert (block.assignment.argmax(1) == own.logits.argmax(1)).all()
    for after, own in zip(slot_maps(net, images), before, strict=True):
        assert torch.equal(after.logits, own.logits)


def test_counts_are_those_of_a_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((2, 20, 30), np.float32)
    scores /= scores.max((1, 2), keepdims=True)
    truth = rng.choice(np.array([0, 1, 3, IGNORED], np.uint8), (20, 30))
    counts = count_pixels(scores, [1, 3], truth, 5)
    for level in (0, 6, 20, 38):
        mask = mask_of(scores, [1, 3], THRESHOLDS[level])
        table = multiclass_confusion_matrix(
            torch.from_numpy(mask.astype(int)), torch.from_numpy(truth.astype(int)), 5, ignore_index=IGNORED
        ).numpy()
        np.testing.assert_array_equal(counts[level], [table.diagonal(), table.sum(0), table.sum(1)])
        union = table.sum(0) + table.sum(1) - table.diagonal()
        assert mean_iou(counts[level]) == pytest.approx(
            100 * (table.diagonal() / np.maximum(union, 1))[union > 0].mean()
        )
    nothing = count_pixels(np.zeros((0, 20, 30), np.float32), [], truth, 5)
    assert (nothing[:, 1, 0] == (truth != IGNORED).sum()).all() and (nothing[:, 0, 0] == (truth == 0).sum()).all()


def test_the_interval_is_of_pairs() -> None:
    """Images differ much and the two ways hardly do, always in one direction: the interval is narrow and above 0."""
    rng = np.random.default_rng(0)
    right = rng.integers(100, 900, (40, 2))
    base = np.stack([right, np.full((40, 2), 1000), np.full((40, 2), 1000)], 1)
    better = base + np.array([[10, 10], [0, 0], [0, 0]])
    gain, low, high = paired_interval(base, better)
    assert gain == pytest.approx(float(mean_iou(better.sum(0)) - mean_iou(base.sum(0)))) and 0 < low < gain < high
    assert high - low < 1
    assert paired_interval(base, base) == (0, 0, 0)
    gain, low, high = paired_interval(base[:1], better[:1])
    assert gain == gain and low != low and high != high, "one image has no interval"


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes in PASCAL VOC's layout with classes of its own, six of them for training; the last is told to be empty."""
    root = tmp_path_factory.mktemp("weak")
    names = ["background", *(f"kind{i}" for i in range(len(CLASSES)))]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(names))
    for index in range(10):
        scene = make_scene(5, index, 64)
        Image.fromarray(scene.image).save(root / "JPEGImages" / f"{index}.jpg", quality=95)
        Image.fromarray(scene.semantic * (index < 9)).save(root / "SegmentationClass" / f"{index}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join("012345"))
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join("6789"))
    return root


def test_a_classifier_from_image_labels(net, voc: Path) -> None:
    train = open_maps(voc).split("train")
    features, labels = features_and_labels(net, described_for(net), train)
    assert features.shape == (6, 64) and labels.shape == (6, 8)
    for row, index in zip(labels, range(6), strict=True):
        assert set(np.flatnonzero(row) + 1) == set(np.unique(make_scene(5, index, 64).semantic)) - {0}
    rng = np.random.default_rng(0)
    there = rng.random((60, 3)) < 0.5
    there[:, 2] = True
    seen = 100 + 5 * np.concatenate([there[:, :2], rng.random((60, 4))], 1)
    layer = fit_label_head(seen, there)
    assert mean_precision(layer, seen, there) == pytest.approx(100)
    assert layer.weight[2].abs().sum() == 0
    scores = layer(torch.from_numpy(seen).float())[:, :2].numpy()
    assert ((scores > 0) == there[:, :2]).all()  # biases fit the shift of the features


def test_measure_on_data_of_other_classes(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--data", voc, "--image-size", 64, "--scales", "[1.0]", "--maps", "cam", "--report", tmp_path / "weak"]
    found = json.loads(output(capsys, "eval", "--task", "weak-segment", *options, "--json"))
    assert (found["images"], found["chosen_on"]) == (2, 2) and "6 training images" in found["about"]
    rows = {row["name"]: row for row in found["rows"]}
    kinds = ["plain map", "slots", "in sequence", "k-means", "untrained", "squares", "SLIC"]
    assert set(kinds) < set(rows) and sum(name.startswith("stages.") for name in rows) == 9
    for row in rows.values():
        assert row["miou"] == row["curve"][round(40 * row["threshold"]) - 1] <= row["best"] == max(row["curve"])
        assert row["gain"] == pytest.approx(row["miou"] - rows["plain map"]["miou"], abs=1e-6)
        assert row["low"] <= row["gain"] <= row["high"]
    assert len(rows["in sequence"]["way"]["path"]) > 1
    page = (tmp_path / "weak" / "report.html").read_text()
    assert "in sequence" in page and (tmp_path / "weak" / "examples.png").is_file()


def test_the_plain_row_is_what_its_masks_are_worth(capsys: pytest.CaptureFixture, scenes_net: Path) -> None:
    """Counted anew, from the masks of the images that are reported, in one confusion matrix."""
    from glmix.models import load

    options = ["--checkpoint", scenes_net, "--data", "scenes", "--limit", 4, "--scales", "[1.0]", "--json"]
    found = json.loads(output(capsys, "eval", "--task", "weak-segment", *options))
    assert found["about"].startswith("The model's own classifier.")
    row = found["rows"][0]
    model, described = load(scenes_net)
    seer = Seer(model, described.prepared, linear_classifier(model), "gradient", [1.0])
    images = open_maps("scenes").split("val")
    images = images.take(spread_over(len(images), 4))
    table = np.zeros((9, 9))
    for index in (1, 3):
        photo, truth, _ = images.read(index)
        classes = [c for c in np.unique(truth) if c]
        mask = mask_of(scores_at(seer.maps(photo, [c - 1 for c in classes]), truth.shape), classes, row["threshold"])
        np.add.at(table, (truth.ravel(), mask.ravel()), 1)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    assert row["miou"] == pytest.approx(100 * (table.diagonal() / np.maximum(union, 1))[union > 0].mean())


@pytest.fixture(scope="module")
def scenes_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of scenes, as first drawn."""
    from glmix.models.description import Description
    from glmix.models.load import build
    from glmix.models.weights import write_checkpoint

    path = tmp_path_factory.mktemp("nets") / "scenes.safetensors"
    arguments = {"dims": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "slot_grid": [3, 3]}
    classes = list(CLASSES)
    description = Description(task="classify", model="glnet_pico", model_args=arguments, classes=classes, names=classes)
    description.preparation = described_for(None)
    write_checkpoint(path, description, build(description).state_dict())
    return path


def test_masks_of_pictures(
    scenes_net: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "photo.png"
    Image.fromarray(make_scene(5, 2, 80).image).crop((0, 0, 80, 64)).save(photo)
    out = tmp_path / "masks"
    options = ["--checkpoint", scenes_net, "--labels", "star, heart", "--scales", "[1.0]"]
    assert "star" in output(capsys, "segment", "--weak", photo, *options)
    found = json.loads((out / "masks.json").read_text())
    assert found["settings"]["blocks"] == ["stages.2.blocks.0"]
    (record,) = found["images"]
    numbers = [CLASSES.index(name) + 1 for name in ("star", "heart")]
    assert record["size"] == [80, 64] and [one["number"] for one in record["objects"]] == numbers
    with Image.open(out / record["mask"]) as file:
        assert file.mode == "P" and file.size == (80, 64)
        mask = np.asarray(file)
    assert set(np.unique(mask)) <= {0, *numbers} and mask.any()
    for one in record["objects"]:
        assert one["share"] == pytest.approx((mask == one["number"]).mean(), abs=1e-4)
    assert (out / "photo.classes.png").is_file()
    output(capsys, "segment", "--weak", photo, *options, "--threshold", 1)
    with Image.open(out / record["mask"]) as file:
        assert not np.asarray(file).any()


def test_mistakes(scenes_net: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = ["segment", tmp_path / "no.png", "--out", tmp_path / "out", "--checkpoint", scenes_net]
    assert "--weak" in mistake(capsys, *base)
    assert "star" in mistake(capsys, *base, "--weak", "--labels", "cat")
    assert "0 to 2" in mistake(capsys, *base, "--weak", "--blocks", 7)
    assert "--blocks []: an empty list" in mistake(capsys, *base, "--weak", "--blocks", "[]")
    assert "between 0 and 1" in mistake(capsys, *base, "--weak", "--threshold", 1.5)
    assert "names no class" in mistake(capsys, *base, "--weak", "--labels", ",")
    assert "--steps 0" in mistake(capsys, *base, "--weak", "--steps", 0, "--blocks", 1)
    described = Description("classify", "glnet_pico", {}, [*map(str, range(300))], [*map(str, range(300))])
    many = write_checkpoint(tmp_path / "many.safetensors", described, build(described).state_dict())
    Image.new("RGB", (64, 64)).save(tmp_path / "grey.png")
    words = [
        "segment",
        "--weak",
        tmp_path / "grey.png",
        "--checkpoint",
        many,
        "--out",
        tmp_path / "o",
        "--image-size",
        32,
    ]
    assert "254 at most" in mistake(capsys, *words, "--top", 300)
    assert "above 0" in mistake(capsys, *base, "--weak", "--scales", "[0.0]")
    measure = ["eval", "--data", "scenes", "--checkpoint", scenes_net]
    assert "--knn" in mistake(capsys, *measure, "--task", "weak-segment", "--knn")
    assert "--maps" in mistake(capsys, *measure, "--maps", "cam")
    assert "--flip" in mistake(capsys, *measure, "--task", "weak-segment", "--flip")
    assert "at least 2" in mistake(capsys, *measure, "--task", "weak-segment", "--limit", 1, "--scales", "[1.0]")
    assert "no such folder" in mistake(capsys, "eval", "--task", "weak-segment", "--data", tmp_path / "none")
