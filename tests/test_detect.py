"""Detectors: heads against torchvision's, training, measures against pycocotools, prediction."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import mistake, output
from objects import scene, write_json, write_split
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection import MaskRCNN as TheirMaskRCNN
from torchvision.models.detection import RetinaNet as TheirRetinaNet

from glmix.cli import main, parse
from glmix.data.detection import open_objects
from glmix.data.samples import Sample
from glmix.models import load
from glmix.models.description import Description
from glmix.models.heads import with_head
from glmix.models.weights import read_checkpoint
from glmix.tasks import task_named
from glmix.tasks.detect import NUMBERS, Augmented, CocoNumbers, DetectLoss, DetectOptions
from glmix.training.module import Trained
from glmix.training.optim import parameter_groups

RECIPES = Path(__file__).parent.parent / "recipes" / "dense"
IDS = {"red": 3, "blue": 7}
OPTIONS = (
    "--task detect --image-size 64 96 --batch-size 2 --precision fp32 --workers 0 --warmup-epochs 0 --ema 0 "
    "--head-channels 16 --anchors 8 16 32 64 128 --lr 3e-3"
).split()


def detector(name: str, classes: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    backbone = timm.create_model("convnext_atto", num_classes=0, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    return with_head(backbone, {"name": name, "head_channels": 16, **options}, classes)


@pytest.fixture(scope="module")
def targets() -> list[dict[str, torch.Tensor]]:
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 10:30, 8:40] = masks[1, 5:60, 50:90] = 1
    boxes = torch.tensor([[8.0, 10, 40, 30], [50, 5, 90, 60]])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "masks": masks[:0]}
    return [{"boxes": boxes, "labels": torch.tensor([1, 0]), "masks": masks}, none]


class Features(nn.Module):
    """The pyramid of one of our detectors, as torchvision's want it."""

    def __init__(self, ours: Any, names: list[str]) -> None:
        super().__init__()
        self.ours, self.names, self.out_channels = [ours], names, ours.width

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.ours[0].features(images), strict=True))


PLAIN = {"min_size": 64, "max_size": 96, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def assert_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], first_label: int) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert len(a["boxes"]) == len(b["boxes"]) > 0
        torch.testing.assert_close(a["boxes"], b["boxes"])
        torch.testing.assert_close(a["scores"], b["scores"])
        assert torch.equal(a["labels"] + first_label, b["labels"])


@pytest.mark.parametrize("box_head", ["v1", "v2"])
def test_retinanet_is_torchvisions(box_head: str, targets: list[dict[str, torch.Tensor]]):
    ours = detector("retinanet", box_head=box_head)
    theirs = TheirRetinaNet(Features(ours, list("01234")), 2, anchor_generator=ours.anchors, head=ours.head,
                            detections_per_img=100, **PLAIN)  # fmt: skip
    images = torch.rand(2, 3, 64, 96)
    wanted = theirs(list(images), targets)
    found = ours(images, None, targets)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    nn.init.zeros_(ours.head.classification_head.cls_logits.bias)  # scores about a half
    with torch.no_grad():
        assert_equal(ours.eval()(images), theirs.eval()(list(images)), 0)


def test_mask_rcnn_is_torchvisions(targets: list[dict[str, torch.Tensor]]):
    ours = detector("mask-rcnn")
    theirs = TheirMaskRCNN(Features(ours, ["0", "1", "2", "3", "pool"]), 3, **PLAIN)
    theirs.rpn, theirs.roi_heads = ours.rpn, ours.roi_heads
    images = torch.rand(2, 3, 64, 96)
    torch.manual_seed(1)
    wanted = theirs(list(images), [t | {"labels": t["labels"] + 1} for t in targets])
    torch.manual_seed(1)
    torch.rand(2)  # theirs draws a size for each image, be there only one
    found = ours(images, [(64, 96), (64, 96)], targets)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    with torch.no_grad():
        mine, others = ours.eval()(images), theirs.eval()(list(images))
    assert_equal(mine, others, 1)
    assert mine[0]["masks"].shape[1:] == (1, 28, 28) and len(mine[0]["boxes"]) == 100


def test_coarse_levels_come_from_the_last_stage():
    """Also where it has as many channels as the pyramid, which torchvision takes for another wish."""
    model = detector("retinanet", head_channels=32)
    assert model.channels[-1] == model.width == 32
    stages = model.stages(torch.rand(1, 3, 64, 96))
    p6 = model.fpn.extra_blocks.p6(stages[-1])
    torch.testing.assert_close(model.features(torch.rand(1, 3, 64, 96))[3].shape, p6.shape)
    images = torch.rand(1, 3, 64, 96)
    torch.testing.assert_close(model.features(images)[3], model.fpn.extra_blocks.p6(model.stages(images)[-1]))


@pytest.mark.parametrize("name", ["retinanet", "mask-rcnn"])
def test_losses(name: str, targets: list[dict[str, torch.Tensor]]):
    """Finite without objects, float32 under bfloat16, and every weight that learns gets its gradient."""
    model = detector(name)
    images = torch.rand(2, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, [(64, 96), (50, 70)], targets)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.stack(list(losses.values())).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without  # distributed training would wait for them
    empty = model(images, None, [targets[1], targets[1]])
    assert all(torch.isfinite(loss) for loss in empty.values())


def test_filling_is_no_place_for_objects():
    model = detector("retinanet").eval()
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    with torch.no_grad():
        (found,) = model(torch.rand(1, 3, 64, 96), [(40, 50)])
    assert len(found["boxes"]) == 100
    assert found["boxes"][:, 2].max() <= 50 and found["boxes"][:, 3].max() <= 40


@pytest.mark.parametrize(
    ("model", "width"), [("glnet_pico", 64), ("glnet_nano", 64), ("convnext_atto", 64), ("glnet_4g", 256)]
)
def test_width_follows_the_backbone(model: str, width: int):
    with torch.device("meta"):
        assert with_head(timm.create_model(model, num_classes=0), {"name": "retinanet"}, 3).width == width
        assert (
            with_head(timm.create_model(model, num_classes=0), {"name": "retinanet", "head_channels": 32}, 3).width
            == 32
        )


def test_boxes_come_back_to_the_picture():
    """A box around all that the network sees is one around the picture, of whatever size and aspect that was."""

    class Whole(nn.Module):
        def forward(self, images: torch.Tensor, sizes: list[tuple[int, int]]) -> list[dict[str, torch.Tensor]]:
            return [{"boxes": torch.tensor([[0.0, 0, w, h], [w / 2, 0, w, h / 2]])} for h, w in sizes]

    task = task_named("detect")
    preparation = task.prepare(DetectOptions(image_size=(64, 96)), timm.create_model("convnext_atto"))
    pictures = [Image.new("RGB", (200, 100)), Image.new("RGB", (30, 40))]
    batch = task.collate([(task.evaluation(preparation)(Sample(p, None, str(i))), []) for i, p in enumerate(pictures)])
    assert batch.sizes == [(48, 96), (85, 64)]
    for picture, found in zip(pictures, task.forward(Whole(), batch), strict=True):
        width, height = picture.size
        assert found["boxes"].tolist() == [[0, 0, width, height], [width / 2, 0, width, height / 2]]


# --- augmentation


@pytest.mark.parametrize("jitter", [[], [0.5, 2.0]])
def test_boxes_and_masks_move_together(jitter: list[float]):
    options = DetectOptions(
        head="mask-rcnn", image_size=(64, 96), scales=[48, 80], large_scale_jitter=jitter, vflip=0.5
    )
    preparation = task_named("detect").prepare(options, timm.create_model("convnext_atto"))
    source = open_objects("scenes").split("train")
    vary = Augmented(options, preparation, True)
    seen = 0
    for i in range(12):
        sample = vary(source.read(i))
        assert sample.target["masks"].shape[1:] == sample.image.shape[1:]
        for box, mask in zip(sample.target["boxes"], sample.target["masks"], strict=True):
            rows, columns = mask.numpy().nonzero()
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(box.numpy() - tight).max() < 3.1, (i, box, tight)  # of a cut object the mask may be smaller
            seen += 1
    assert seen > 10


def test_crowds_are_not_learned():
    source = open_objects("scenes").split("train")
    sample = source.read(0)
    objects = sample.target
    objects.crowd[0] = True
    vary = Augmented(DetectOptions(image_size=(96, 96), hflip=0), task_named("detect").prepare(
        DetectOptions(image_size=(96, 96)), timm.create_model("convnext_atto")), False)  # fmt: skip
    assert vary(sample).target["boxes"].tolist() == objects.boxes[1:].tolist()


# --- a run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    write_split(folder, "train", 6, 0, IDS)
    content = write_split(folder, "val", 4, 10, IDS)
    for i, each in enumerate(content["annotations"]):
        each["id"] = i  # from 0: pycocotools itself takes that for no match
    content["annotations"][1]["iscrowd"] = 1
    del content["annotations"][2]["area"]
    write_json(folder, "instances_val.json", content)
    return folder


def train(root: Path, out: Path, head: str, *more: str) -> int:
    return main(["train", "--data", str(root), "--out", str(out), "--head", head, *OPTIONS, *more])


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detector") / "run"
    assert train(root, out, "mask-rcnn", "--epochs", "1", "--lr", "2e-5") == 0  # untrained, it finds a hundred
    return out


def test_a_checkpoint_says_what_it_is(run: Path):
    model, description = load(run)
    assert (description.task, description.classes, description.head["name"]) == ("detect", ["red", "blue"], "mask-rcnn")
    assert description.info["category_ids"] == [3, 7]
    assert description.prepared.size == (64, 96) and description.prepared.resize == "short"
    assert not model.training


def test_eval_is_pycocotools_on_what_predict_writes(run: Path, root: Path, tmp_path: Path, capsys):
    figures = json.loads(output(capsys, "eval", "--checkpoint", run, "--data", root, "--json", "--workers", 0))
    pictures = [root / "val" / f"{i}.png" for i in range(4)]
    output(capsys, "predict", "--checkpoint", run, "--pictures", tmp_path, *pictures)
    content = json.loads((root / "annotations" / "instances_val.json").read_text())
    for each in content["annotations"]:
        each["id"] += 1
        each.setdefault("area", each["bbox"][2] * each["bbox"][3])
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert {category["id"]: category["name"] for category in found["categories"]} == {3: "red", 7: "blue"}
    images = {image["id"]: int(Path(image["file_name"]).stem) for image in found["images"]}
    for each in found["annotations"]:
        each["image_id"] = images[each["image_id"]]
    assert found["annotations"]
    truth = COCO()
    truth.dataset = content
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with redirect_stdout(StringIO()):
            truth.createIndex()
            boxes_alone = [
                {k: v for k, v in each.items() if k not in ("segmentation", "area")} for each in found["annotations"]
            ]
            results = truth.loadRes(boxes_alone if kind == "bbox" else found["annotations"])
            coco = COCOeval(truth, results, kind)
            coco.evaluate()
            coco.accumulate()
            coco.summarize()
        assert [figures[f"{name}_{number}"] for number in NUMBERS] == coco.stats.tolist()
    assert figures["AP"] == figures["mask_AP"] and set(figures["classes"]) <= {"red", "blue"}
    with Image.open(tmp_path / "0.objects.png") as picture:
        assert picture.width == 480


def truth_as_found(sample: Sample, shift: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
    objects = sample.target
    boxes = torch.tensor(objects.boxes + shift)
    found = {"boxes": boxes, "labels": torch.tensor(objects.labels), "scores": torch.full((len(boxes),), 0.9)}
    return found, {"objects": objects, "size": objects.size, "name": sample.name}


def test_perfect_boxes_count_as_perfect(root: Path):
    metrics = CocoNumbers(Description(classes=["red", "blue"], names=["red", "blue"]))
    source = open_objects(root).split("val")
    for i in range(len(source)):
        found, target = truth_as_found(source.read(i))
        metrics.update([found], [target])
    assert metrics.compute()["box_AP"] == pytest.approx(1.0)
    assert metrics.details()["classes"]["red"] == {"box_AP": pytest.approx(1.0), "box_AP50": pytest.approx(1.0)}
    assert metrics.details()["worst"] == []


@pytest.mark.parametrize("edge", [False, True])
def test_figures_of_imperfect_boxes_are_pycocotools(edge: bool, root: Path, tmp_path: Path):
    """Boxes moved, missed and invented, of wrong classes, and with ties among the scores; objects over the edge."""
    if edge:
        root = Path(shutil.copytree(root, tmp_path / "edge"))
        content = json.loads((root / "annotations" / "instances_val.json").read_text())
        for number, each in enumerate(content["annotations"]):
            if number % 2:
                each["bbox"] = [
                    -1.5,
                    -1.5,
                    each["bbox"][0] + each["bbox"][2] + 1.5,
                    each["bbox"][1] + each["bbox"][3] + 1.5,
                ]
                del each["segmentation"]
        content["annotations"][0]["area"] = 0
        write_json(root, "instances_val.json", content)
    rng = np.random.default_rng(0)
    metrics = CocoNumbers(Description(classes=["red", "blue"], names=["red", "blue"]))
    source = open_objects(root).split("val")
    results = []
    for i in range(len(source)):
        found, target = truth_as_found(source.read(i))
        several = {name: value.repeat(3, *[1] * (value.ndim - 1)) for name, value in found.items()}
        several["boxes"] = several["boxes"] + torch.tensor(rng.normal(0, 2, several["boxes"].shape))
        several["scores"] = torch.tensor(rng.integers(1, 5, len(several["scores"])) / 5)
        several["labels"] = torch.where(torch.tensor(rng.random(len(several["labels"])) < 0.2), 0, several["labels"])
        metrics.update([several], [target])
        for (x0, y0, x1, y1), label, score in zip(
            *(several[k].tolist() for k in ("boxes", "labels", "scores")), strict=True
        ):
            category = (3, 7)[label]
            results.append({"image_id": i, "category_id": category, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    truth = COCO()
    truth.dataset = json.loads((root / "annotations" / "instances_val.json").read_text())
    for each in truth.dataset["annotations"]:
        each["id"] += 1
        each.setdefault("area", each["bbox"][2] * each["bbox"][3])
    with redirect_stdout(StringIO()):
        truth.createIndex()
        coco = COCOeval(truth, truth.loadRes(results), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    figures = metrics.compute()
    assert [figures[f"box_{number}"] for number in NUMBERS] == coco.stats.tolist()
    assert 0.1 < figures["box_AP"] < 0.9


def test_an_object_without_a_mask_takes_no_numbers_away(root: Path):
    """Among others that have one: its box counts as a box; for masks what is found there is neither right nor wrong."""
    source = open_objects(root).split("val")
    figures = []
    for bare in (False, True):
        metrics = CocoNumbers(Description(classes=["red", "blue"], names=["red", "blue"]))
        for i in range(len(source)):
            found, target = truth_as_found(source.read(i))
            found["masks"] = torch.ones(len(found["boxes"]), 1, 28, 28)
            if bare and i == 0:
                target["objects"].segmentations[0] = None
                found["masks"][0, 0, 6:] = 0  # a fifth of the box: counted, it were a miss and a false one
            metrics.update([found], [target])
        figures.append(metrics.compute())
    assert figures[0]["mask_AP"] == figures[1]["mask_AP"] == figures[1]["AP"] == pytest.approx(1.0)
    assert figures[0]["box_AP"] == figures[1]["box_AP"]


def test_a_picture_is_seen_as_if_alone(run: Path, root: Path, tmp_path: Path, capsys):
    """What is found in one does not hang on the other pictures of its batch, which are of other sizes."""
    scene(5, (90, 64))[0].save(tmp_path / "tall.png")
    wide = root / "val" / "0.png"

    def found(*pictures: Path) -> Any:
        rows = output(capsys, "predict", "--checkpoint", run, "--json", *pictures).splitlines()
        return json.loads(rows[0])["predictions"]

    assert found(wide, tmp_path / "tall.png") == found(wide)


def test_the_worst_images_come_first(root: Path):
    metrics = CocoNumbers(Description(classes=["red", "blue"], names=["red", "blue"]))
    source = open_objects(root).split("val")
    for i in range(len(source)):
        found, target = truth_as_found(source.read(i), shift=30.0 if i == 3 else 0.0)
        metrics.update([found], [target])
    metrics.compute()
    assert metrics.details()["worst"] == [{"image": "val/3.png", "missed": 2, "false": 2}]


def test_what_is_said(run: Path, root: Path, capsys):
    said = output(capsys, "eval", "--checkpoint", run, "--data", root, "--workers", 0)
    assert "mask_AP50" in said and "on 4 images" in said and "worst: val/" in said
    picture = root / "val" / "0.png"
    row = json.loads(output(capsys, "predict", "--checkpoint", run, "--json", "--top", 2, picture))
    assert len(row["predictions"]) == 2 and {"name", "score", "bbox", "segmentation"} <= set(row["predictions"][0])
    assert {each["category_id"] for each in row["predictions"]} <= {3, 7}


def test_slots_of_a_detector(run: Path, root: Path, tmp_path: Path, capsys):
    output(
        capsys, "explain", "--checkpoint", run, "--out", tmp_path, "--figures", "slots,found", root / "val" / "0.png"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"0.slots.png", "0.found.png"}
    assert "which draws nothing" in mistake(capsys, "explain", "--figures", "found", root / "val" / "0.png")


class Cut(Exception):  # noqa: N818  (no error of the program)
    """Stands for a power cut."""


def test_cut_and_resumed(root: Path, tmp_path: Path, monkeypatch):
    """All that is random is on, and the weights end bitwise as those of a run that was never cut."""
    small = ["--model", "convnext_atto", "--model-args", "{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}"]
    varied = [*small, "--epochs", "2", "--scales", "48", "64", "--color-jitter", "0.3", "--vflip", "0.5", "--ema", "0.9",
              "--drop-path", "0.2", "--checkpoint-steps", "1", "--limit-val-batches", "1"]  # fmt: skip
    assert train(root, tmp_path / "whole", "mask-rcnn", *varied) == 0
    original = Trained.training_step

    def cut(self: Any, batch: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (1, 1):
            raise Cut
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "training_step", cut)
        with pytest.raises(Cut):
            train(root, tmp_path / "cut", "mask-rcnn", *varied)
    assert train(root, tmp_path / "cut", "mask-rcnn", *varied, "--resume") == 0
    for name in ("last.safetensors", "last_ema.safetensors"):
        a, b = (read_checkpoint(tmp_path / folder / name)[1] for folder in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_kills(root: Path, tmp_path: Path):
    """SIGKILL at six random moments, with two loading processes; the weights end bitwise as those of a run left alone."""
    small = ["--model", "convnext_atto", "--model-args", "{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32]}"]
    varied = [*small, *OPTIONS, "--head", "mask-rcnn", "--epochs", "12", "--scales", "48", "64", "--drop-path", "0.2",
              "--ema", "0.9", "--checkpoint-steps", "1", "--limit-val-batches", "1", "--data", str(root)]  # fmt: skip
    varied[varied.index("--workers") + 1] = "2"
    assert main(["train", "--out", str(tmp_path / "whole"), *varied]) == 0
    out, rng, kills = tmp_path / "cut", np.random.default_rng(0), 0
    point = out / "resume.ckpt"
    while True:
        before = point.stat().st_mtime_ns if point.exists() else 0
        command = [sys.executable, "-m", "glmix.cli", "train", "--out", str(out), *varied, "--resume"]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        if kills == 6:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            break
        while process.poll() is None and not (point.exists() and point.stat().st_mtime_ns != before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, "the run is too short for so many kills"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    for name in ("last.safetensors", "last_ema.safetensors"):
        a, b = (read_checkpoint(tmp_path / folder / name)[1] for folder in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_no_number_stops_the_run(root: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(DetectLoss, "__call__", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    assert train(root, tmp_path / "run", "retinanet") == 2
    told = capsys.readouterr().err
    assert re.search(r"the loss is nan in epoch 1, batch 1 \(train/\d\.png, train/\d\.png", told)


# --- mistakes


def test_mistakes(run: Path, root: Path, photos: Path, tmp_path: Path, capsys):
    def refused(*arguments: object) -> str:
        return mistake(capsys, "train", "--out", tmp_path / "run", "--data", root, *OPTIONS, *arguments)

    assert "head must be one of retinanet, mask-rcnn, not upernet" in refused("--head", "upernet")
    assert "five sides" in refused("--anchors", "8", "16")
    assert "the shorter side first" in refused("--image-size", "96", "64")
    assert "head_channels 48: a multiple of 32 with box_head v2" in refused("--head-channels", "48", "--box-head", "v2")
    assert "has stages of strides [16]; heads stand on strides 4, 8" in refused("--model", "vit_tiny_patch16_224")
    assert "least and the largest factor" in refused("--large-scale-jitter=[2.0,0.5]")
    assert "class folders are for --task classify" in mistake(
        capsys, "train", "--out", tmp_path / "run", "--data", photos, *OPTIONS
    )
    told = mistake(capsys, "eval", "--checkpoint", run, "--data", photos)
    assert "class folders are for --task classify" in told and f"({run} is for detect)" in told
    assert "--backbone-norm sync needs CUDA" in refused("--backbone-norm", "sync")
    assert "nothing to draw" in mistake(capsys, "predict", "--pictures", tmp_path, root / "val" / "0.png")
    other = tmp_path / "other"
    write_split(other, "train", 6, 0, {"red": 1, "blue": 2})
    content = json.loads((other / "annotations" / "instances_train.json").read_text())
    content["categories"][0]["name"] = "green"
    content["annotations"][0]["category_id"] = 1
    write_json(other, "instances_train.json", content)
    assert "1 of 2 classes are not among the model's 2 classes (first: green" in mistake(
        capsys, "eval", "--checkpoint", run, "--data", other
    )
    for each in content["annotations"]:
        del each["segmentation"]
    write_json(other, "instances_train.json", content)
    told = mistake(capsys, "train", "--out", tmp_path / "run", "--data", other, *OPTIONS, "--head", "mask-rcnn")
    assert "objects have no mask, and mask-rcnn learns from masks" in told and "object 1, has no mask" in told


def test_a_broken_picture_ends_no_run(root: Path, tmp_path: Path, capsys):
    """Neither does one whose annotations are for another size; both are named."""
    data = tmp_path / "data"
    write_split(data, "train", 6, 0, IDS)
    write_split(data, "val", 2, 10, IDS)
    (data / "train" / "1.png").write_bytes(b"no picture")
    scene(2)[0].resize((32, 24)).save(data / "train" / "2.png")
    assert train(data, tmp_path / "run", "retinanet", "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert (
        "train/1.png: not an image" in said
        and "train/2.png: is 32 x 24 pixels, its annotations are for 64 x 48" in said
    )


def test_check_data_names_every_one(tmp_path: Path, capsys):
    """However many there are; a picture that is not there cannot be used, a box that is not is no picture."""
    content = write_split(tmp_path, "train", 9, 0, IDS)
    write_split(tmp_path, "val", 2, 10, IDS)
    for each in content["annotations"][:5]:
        each["bbox"] = [1, 1, 0, 0]
    write_json(tmp_path, "instances_train.json", content)
    said = output(capsys, "check-data", "--data", tmp_path, "--task", "detect")
    assert all(f"annotation {number}: box without area" in said for number in range(1, 6))
    for number in range(5, 9):
        (tmp_path / "train" / f"{number}.png").unlink()
    assert main(["check-data", "--data", str(tmp_path), "--task", "detect"]) == 2
    told = capsys.readouterr()
    assert all(f"{number}.png (image {number}): picture that is not there" in told.out for number in range(5, 9))
    assert "4 of 11 images cannot be used" in told.err


# --- recipes

TABLE = {  # model, head, lr, decay, drop path, epochs, falls of the learning rate
    "retinanet_glnet_4g_1x": ("glnet_4g", "retinanet", 1e-4, 1e-4, 0.2, 12, [8, 11]),
    "retinanet_glnet_4g_3x": ("glnet_4g", "retinanet", 1e-4, 1e-4, 0.2, 36, [27, 33]),
    "mask_rcnn_glnet_4g_1x": ("glnet_4g", "mask-rcnn", 1e-4, 0.05, 0.2, 12, [8, 11]),
    "mask_rcnn_glnet_4g_3x": ("glnet_4g", "mask-rcnn", 1e-4, 0.05, 0.2, 36, [27, 33]),
}


def detect_recipes() -> dict[str, Path]:
    return {p.stem: p for p in RECIPES.glob("*.yaml") if yaml.safe_load(p.read_text())["task"] == "detect"}


@pytest.mark.parametrize("name", detect_recipes())
def test_recipes(name: str):
    options = parse("train", ["--config", str(detect_recipes()[name])])[1]
    if "glnet_4g" in name:
        assert TABLE[name] == (options.model, options.head, options.lr, options.weight_decay, options.drop_path,
                               options.epochs, options.milestones)  # fmt: skip
        assert options.image_size == (800, 1333) and options.box_head == "v1" and not options.anchors
        assert bool(options.scales) == name.endswith("3x")
    labels = ["a", "b"]
    head = options.described_head()
    description = Description("detect", options.model, options.model_args, labels, labels, head=head)
    with torch.device("meta"):
        model = task_named("detect").build(description, drop_path_rate=options.drop_path)
    assert parameter_groups(model, options.weight_decay)
    assert task_named("detect").prepare(options, model)(Image.new("RGB", (900, 900))).shape[1] == options.image_size[0]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "mask-rcnn"])
def test_scenes_are_learned(head: str, tmp_path: Path):
    assert main(["train", "--config", str(RECIPES / "scenes_detect.yaml"), "--head", head, "--out", str(tmp_path / "run"),
                 "--workers", "2"]) == 0  # fmt: skip
    info = load(tmp_path / "run")[1].info
    assert info[f"val_{'mask' if head == 'mask-rcnn' else 'box'}_AP50"] >= 0.9
