"""Segmentation: heads held to other implementations, what is measured held to numbers worked out by hand, and the commands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import mistake, output
from PIL import Image
from torch import Tensor, nn

from glmix.cli import main
from glmix.data.loading import Batch
from glmix.data.masks import IGNORED, open_maps
from glmix.data.prepare import Preparation
from glmix.data.samples import Sample
from glmix.errors import UserError
from glmix.models import backbone_of, create_model, load, load_body
from glmix.models.description import Description
from glmix.models.heads import with_head
from glmix.models.heads.segment import SemanticFPN, UPerNet, pooled
from glmix.models.weights import read_checkpoint
from glmix.tasks.segment import SEGMENT, Augmented, PixelScores, SegmentLoss, SegmentOptions, Views, forward

SMALL: dict[str, Any] = {"dims": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "slot_grid": (2, 2), "num_classes": 0}


def backbone(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("glnet_4g", **SMALL | options)


@torch.no_grad()
def shaken(module: nn.Module) -> nn.Module:
    """Norms with statistics and weights of their own, as after a training."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)  # type: ignore[union-attr,operator]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
            part.weight.uniform_(0.5, 2)
            part.bias.normal_(0, 0.2)
    return module.eval()


# --- heads


@torch.no_grad()
def test_upernet_is_that_of_transformers():
    """With the same weights, the scores of the head and of the auxiliary head are those of transformers' UperNet."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    model = shaken(UPerNet(backbone(), 7, head_channels=48))
    config = transformers.UperNetConfig(hidden_size=48, pool_scales=[1, 2, 3, 6], num_labels=7,
                                        auxiliary_channels=48, auxiliary_in_channels=64, auxiliary_in_index=2)  # fmt: skip
    ours = {k: v for k, v in model.state_dict().items() if not k.startswith(("backbone.", "norms."))}
    units = {"0": "conv", "1": "batch_norm"}

    def unit(name: str) -> str:
        head, number, rest = name.rsplit(".", 2)
        return f"{head}.{units[number]}.{rest}"

    main, auxiliary = {}, {}
    for name, value in ours.items():
        if name.startswith("auxiliary.2."):
            auxiliary[name.replace("auxiliary.2", "classifier")] = value
        elif name.startswith("auxiliary."):
            auxiliary[unit(name).replace("auxiliary.0", "convs.0")] = value
        elif name.startswith("classify."):
            main[name.replace("classify.1", "classifier")] = value
        else:
            new = unit(name)
            for before, after in (
                ("bottleneck", "bottleneck"), ("lateral", "lateral_convs"), ("smooth", "fpn_convs"), ("fuse", "fpn_bottleneck"),
            ):  # fmt: skip
                new = new.replace(before, after, 1) if new.startswith(before) else new
            if new.startswith("context"):
                parts = new.split(".")
                new = ".".join(["psp_modules", parts[1], "1", *parts[2:]])
            main[new] = value
    theirs, fcn = UperNetHead(config, model.channels).eval(), UperNetFCNHead(config, in_channels=model.channels).eval()
    theirs.load_state_dict(main)
    fcn.load_state_dict(auxiliary)
    images = torch.randn(2, 3, 96, 128)
    stages = model.stages(images)
    scores, beside = model.scores(images)
    assert torch.allclose(scores, F.interpolate(theirs(stages), (96, 128), mode="bilinear"), atol=1e-5)
    assert beside is not None
    assert torch.allclose(beside, F.interpolate(fcn(stages), (96, 128), mode="bilinear"), atol=1e-5)
    assert torch.equal(model(images), scores)


@torch.no_grad()
@pytest.mark.parametrize("places", [1, 2, 3, 6])
def test_pooling_is_adaptive(places: int):
    x = torch.randn(2, 5, 7, 11)
    assert torch.allclose(pooled(x, places), F.adaptive_avg_pool2d(x, places), atol=1e-6)


@torch.no_grad()
def test_semantic_fpn_step_by_step():
    """A level at stride 32 takes three steps up, one at stride 16 two, one at stride 8 one; their sum is classified."""
    model = shaken(SemanticFPN(backbone(), 5, head_channels=32))
    images = torch.randn(1, 3, 64, 64)

    def double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear")

    c2, c3, c4, c5 = (lateral(stage) for lateral, stage in zip(model.lateral, model.stages(images), strict=True))
    p5 = c5
    p4 = c4 + double(p5)
    p3 = c3 + double(p4)
    p2 = c2 + double(p3)
    p2, p3, p4, p5 = (smooth(level) for smooth, level in zip(model.smooth, (p2, p3, p4, p5), strict=True))
    a2, a3, a4, a5 = model.ascend
    total = a2(p2) + double(a3(p3)) + double(a4[1](double(a4[0](p4)))) + double(a5[2](double(a5[1](double(a5[0](p5))))))
    expected = F.interpolate(model.classify(total), (64, 64), mode="bilinear")
    assert torch.allclose(model(images), expected, atol=1e-5)


def test_widths():
    """As published on a backbone of a published size, narrow on a small one; any width may be asked for."""
    with torch.device("meta"):
        large, small = (timm.create_model(name, num_classes=0) for name in ("glnet_4g", "glnet_pico"))
        assert UPerNet(large, 3).fuse[0].out_channels == 512
        assert UPerNet(timm.create_model("glnet_4g", num_classes=0), 3).auxiliary[0][0].out_channels == 256
        assert SemanticFPN(small, 3).lateral[0].out_channels == 64
        asked = SemanticFPN(timm.create_model("glnet_pico", num_classes=0), 3, head_channels=96)
        assert (asked.lateral[0].out_channels, asked.classify[1].in_channels) == (96, 48)


@pytest.mark.parametrize("name", ["upernet", "semantic-fpn"])
def test_any_size_and_export(name: str):
    """Sides that no stride divides; exported with free batch and size, the same scores."""
    model = shaken(with_head(backbone(), {"name": name, "head_channels": 32}, 4))
    image = torch.randn(1, 3, 75, 101)
    with torch.no_grad():
        expected = model(image)
    assert expected.shape == (1, 4, 75, 101)
    sides = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    program = torch.export.export(model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=(sides,))
    with torch.no_grad():
        assert torch.allclose(program.module()(image), expected, atol=1e-4)


def test_another_backbone_of_timm():
    model = with_head(timm.create_model("test_convnext", num_classes=0), {"name": "upernet", "head_channels": 16}, 3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)


def test_stages_are_chosen_by_their_strides():
    """ResNet has one more, of stride 2, and some nets have stages of one stride: heads see the last of 4, 8, 16 and 32."""
    model = with_head(timm.create_model("resnet18", num_classes=0), {"name": "upernet", "head_channels": 16}, 3)
    assert [tuple(stage.shape[1:]) for stage in model.stages(torch.randn(1, 3, 64, 64))] == [
        (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]  # fmt: skip


# --- loss and measure


def description(classes: str = "abc") -> Description:
    plain = Preparation((32, 128), resize="short", crop=1.0, interpolation="bilinear")
    return Description("segment", "glnet_pico", classes=list(classes), names=list(classes), preparation=plain)


def test_the_loss_passes_over_pixels_without_a_class():
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    classes = torch.randint(0, 3, (2, 4, 4))
    classes[0, :2] = IGNORED
    known = classes != IGNORED
    rows = scores.permute(0, 2, 3, 1)[known].log_softmax(1)
    expected = -rows[torch.arange(len(rows)), classes[known]].mean()

    class Model:
        def scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return scores, 2 * scores

    loss = SegmentLoss(SegmentOptions(aux_weight=0.5), nn.Identity(), description())
    beside = SegmentLoss.entropy(2 * scores, classes)
    batch = Batch(torch.zeros(2, 3, 4, 4), list(classes), [])
    assert torch.allclose(loss(Model(), batch, 0), expected + 0.5 * beside)
    assert SegmentLoss.entropy(scores, torch.full_like(classes, IGNORED)) == 0


def test_what_is_measured_by_hand():
    """Two pictures, four classes, of which c is never there nor found, and d is found alone."""
    there = [torch.tensor([[0, 0, 1], [1, 1, IGNORED]]), torch.tensor([[1, 1]])]
    found = [torch.tensor([[0, 1, 1], [1, 3, 0]]), torch.tensor([[1, 0]])]
    metrics = PixelScores(description("abcd"))
    for one, other in zip(found, there, strict=True):
        metrics.update([one], [{"map": other.to(torch.uint8), "name": f"{len(other)}.png"}])
    scores = metrics.compute()
    iou_a, iou_b, iou_d = 1 / 3, 3 / 6, 0 / 1  # a: right 1, there 2, found 2; b: right 3, there 5, found 4
    assert scores["miou"] == pytest.approx(100 * (iou_a + iou_b + iou_d) / 3)
    assert scores["macc"] == pytest.approx(100 * (1 / 2 + 3 / 5) / 2)
    assert scores["aacc"] == pytest.approx(100 * 4 / 7)
    details = metrics.details()
    assert set(details["classes"]) == {"a", "b", "d"}
    assert details["classes"]["b"] == {"iou": pytest.approx(50), "accuracy": pytest.approx(60)}
    assert [row["image"] for row in details["worst"]] == ["1.png", "2.png"]


def test_the_thinnest_pictures_have_an_answer():
    """At their aspect they would have no height at all."""
    model = shaken(with_head(backbone(), {"name": "semantic-fpn", "head_channels": 16}, 3))
    transform = SEGMENT.evaluation(description().prepared)
    for size in ((2000, 3), (1, 700), (1, 1)):
        with torch.no_grad():
            (found,) = forward(model, SEGMENT.collate([(transform(Sample(Image.new("RGB", size), None, "x")), [])]))
        assert found.shape == size[::-1]
    tall = description().prepared(Image.new("RGB", (50, 90)))
    assert tall.shape == (3, 57, 32)  # 32 / 50 of 90 is 57.6: as torchvision has it


def test_pictures_of_several_sizes_are_seen_alone():
    """Answers are as large as the pictures were, and what one is filled up with changes nothing."""
    model = shaken(with_head(backbone(), {"name": "semantic-fpn", "head_channels": 32}, 3))
    transform = SEGMENT.evaluation(description().prepared)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((40, 60), (90, 50))]
    items = [(transform(Sample(picture, None, str(i))), []) for i, picture in enumerate(pictures)]
    with torch.no_grad():
        together = forward(model, SEGMENT.collate(items))
        alone = [forward(model, SEGMENT.collate([item]))[0] for item in items]
    assert [tuple(found.shape) for found in together] == [(40, 60), (90, 50)]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_picture_and_map_go_together():
    """Where the picture is bright, the map says 1; scaled, cut and mirrored, it still does. What is outside is ignored."""
    classes = np.zeros((40, 60), np.uint8)
    classes[5:30, 10:35] = 1
    picture = Image.fromarray(np.repeat(classes[..., None] * 200, 3, 2))
    plain = description().prepared
    asked = SegmentOptions(crop_size=64, image_size=40, scales=(0.5, 2.0), color_jitter=0.0)
    transform = Augmented(asked, Preparation((40, 160), resize="short", interpolation="bilinear"))
    bright = (200 / 255 - plain.mean[0]) / plain.std[0] / 2 + (0 - plain.mean[0]) / plain.std[0] / 2
    seen, ignored, flipped = [], 0, set()
    for seed in range(24):
        torch.manual_seed(seed)
        sample = transform(Sample(picture, classes, "x"))
        assert sample.image.shape == (3, 64, 64) and sample.target.shape == (64, 64)
        inside = sample.target != IGNORED
        ignored += int((~inside).sum())
        agree = ((sample.image[0] > bright) == (sample.target == 1))[inside].float().mean()
        assert agree > 0.93, seed  # but for the edges, which are blurred
        seen.append(float((sample.target == 1).sum()))
        columns = (sample.target == 1).any(0).nonzero()
        flipped.add(bool(len(columns)) and int(columns.min()) > 63 - int(columns.max()))
    assert ignored and len(set(seen)) > 12 and flipped == {True, False}


@torch.no_grad()
def test_views_are_averaged():
    """Mirrored, scaled and in windows, by hand; the model says what it sees: the brightness of each pixel."""

    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            shift = torch.linspace(0, 1, images.shape[3])  # depends on the column, so that a mirror matters
            return torch.stack([images[:, 0] + shift, -images[:, 0]], 1)

    images, plain = torch.randn(1, 3, 64, 96), Bright()
    mirrored = plain(images.flip(3)).softmax(1).flip(3)
    flipped = Views(plain, True, [1.0], 0)(images)
    assert torch.allclose(flipped, (plain(images).softmax(1) + mirrored) / 2, atol=1e-6)
    half = F.interpolate(images, (32, 48), mode="bilinear", antialias=True)
    small = F.interpolate(plain(half).softmax(1), (64, 96), mode="bilinear")
    assert torch.allclose(Views(plain, False, [1.0, 0.5], 0)(images), (plain(images).softmax(1) + small) / 2, atol=1e-6)
    parts = Views(plain, False, [1.0], 64)(images)
    left, right = plain(images[..., :64]), plain(images[..., 32:])
    middle = (left[..., 32:] + right[..., :32]) / 2
    assert torch.allclose(parts, torch.cat([left[..., :32], middle, right[..., 32:]], 3).softmax(1), atol=1e-6)
    assert torch.allclose(Views(plain, False, [1.0], 200)(images), plain(images).softmax(1), atol=1e-6)


# --- the commands


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a bright square on dark ground, and their maps: 12 to train on, 4 to validate, of two sizes."""
    root = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (root / split).mkdir()
        (root / f"{split}annot").mkdir()
        for i in range(count):
            size = (48, 64) if i % 2 else (56, 48)
            pixels, classes = rng.integers(0, 80, (*size, 3), np.uint8), np.zeros(size, np.uint8)
            y, x = rng.integers(0, 20, 2)
            classes[y : y + 24, x : x + 24] = 1
            classes[0, :3] = 255
            pixels[classes == 1] += 120
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            Image.fromarray(classes).save(root / f"{split}annot" / f"{i}.png")
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


QUICK = "--task segment --head-channels 16 --crop-size 48 --image-size 48 --epochs 3 --batch-size 4 --lr 2e-3 --workers 0 --precision fp32 --warmup-epochs 0 --ema 0".split()
ARGS = ["--model-args", "{dims: [32, 32, 32, 32], depths: [1, 1, 1, 1], slot_grid: [2, 2]}"]


@pytest.fixture(scope="module")
def trained(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(squares), "--out", str(out), *QUICK, *ARGS]) == 0
    return out


def test_a_run_learns_and_is_measured(trained: Path, squares: Path, capsys: pytest.CaptureFixture):
    scores = json.loads(output(capsys, "eval", "--checkpoint", trained, "--data", squares, "--json"))
    described, _ = read_checkpoint(trained)
    assert scores["miou"] == pytest.approx(described.info["val_miou"])
    assert scores["miou"] > 75 and scores["images"] == 4
    assert described.classes == ["ground", "square"] and described.head["name"] == "semantic-fpn"
    assert set(scores["classes"]) == {"ground", "square"} and len(scores["worst"]) == 4
    text = output(capsys, "eval", "--checkpoint", trained, "--data", squares, "--flip", "--scales", "[0.75,1.0]")
    assert "mIoU" in text and "square" in text and "worst: val/" in text
    model, _ = load(trained)
    assert isinstance(model, SemanticFPN) and backbone_of(model).slot_mixers()


def test_cut_and_resumed_it_is_the_same(trained: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    from glmix.training.module import Trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trained, "on_validation_epoch_end", lambda self: 1 // 0 if self.current_epoch else None)
        with pytest.raises(ZeroDivisionError):
            output(capsys, "train", "--data", squares, "--out", tmp_path / "cut", *QUICK, *ARGS)
    output(capsys, "train", "--out", tmp_path / "cut", "--resume")
    whole, again = (read_checkpoint(path / "last.safetensors")[1] for path in (trained, tmp_path / "cut"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_predict_and_explain(trained: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    image = squares / "val" / "0.png"
    row = json.loads(output(capsys, "predict", image, "--checkpoint", trained, "--json"))
    shares = {answer["name"]: answer["share"] for answer in row["predictions"]}
    truth = (np.array(Image.open(squares / "valannot" / "0.png")) == 1).mean()
    assert shares["square"] == pytest.approx(truth, abs=0.15) and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    output(capsys, "predict", image, "--checkpoint", trained, "--pictures", tmp_path / "seen")
    with Image.open(tmp_path / "seen" / "0.map.png") as found, Image.open(tmp_path / "seen" / "0.classes.png") as drawn:
        assert found.size == (48, 56) and set(np.unique(found)) == {0, 1}
        assert (np.array(found) == 1).mean() == pytest.approx(shares["square"], abs=1e-3)
        assert drawn.width == 411 and drawn.height > 480  # small pictures are drawn larger
        drawn = drawn.crop((0, 0, 411, 480)).resize(found.size, Image.Resampling.NEAREST)
        assert found.mode == "P" and len(set(found.convert("RGB").getdata())) == 2
        colours = {
            tuple(np.asarray(drawn)[np.argwhere(np.array(found) == i)[9][0], np.argwhere(np.array(found) == i)[9][1]])
            for i in (0, 1)
        }
        assert len(colours) == 2
    output(capsys, "explain", image, "--checkpoint", trained, "--out", tmp_path / "slots")
    assert (tmp_path / "slots" / "0.slots.png").exists() and (tmp_path / "slots" / "0.found.png").exists()


@pytest.mark.parametrize("ending", ["free.onnx", "free.xml", "static.xml"])
def test_exported_files_are_measured_and_predict(
    ending: str, trained: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """As the checkpoint does; but a static one sees whole pictures squashed to a square."""
    path = tmp_path / ending
    static = ["--static"] if "static" in ending else []
    said = output(capsys, "export", "--checkpoint", trained, *static, path)
    assert re.search(r"top-1 agrees on (\d+) of \1 pixels", said)
    wanted, given = (
        json.loads(output(capsys, "eval", "--checkpoint", c, "--data", squares, "--workers", 0, "--json"))
        for c in (trained, path)
    )
    assert given["miou"] == pytest.approx(wanted["miou"], abs=15 if static else 0.1)
    image = squares / "val" / "0.png"
    answers = [json.loads(output(capsys, "predict", image, "--checkpoint", c, "--json")) for c in (trained, path)]
    shares = [{row["name"]: row["share"] for row in answer["predictions"]} for answer in answers]
    assert shares[1] == pytest.approx(shares[0], abs=0.1 if static else 1e-3)


def test_from_other_weights(trained: Path, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """From a segmenter of these classes all is taken, from a classifier the backbone; frozen parts stay as they are."""
    more = ["train", "--data", squares, *QUICK, *ARGS, "--epochs", 1, "--backbone-norm", "frozen", "--freeze-stages", 1]
    assert main([*map(str, more), "--out", str(tmp_path / "again"), "--init", str(trained)]) == 0
    assert "entries of the backbone are taken; the head is taken too" in capsys.readouterr().err
    before, after = read_checkpoint(trained)[1], read_checkpoint(tmp_path / "again")[1]
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert not {k for k in moved if k.startswith(("backbone.stem", "backbone.stages.0"))}
    assert not {k for k in moved if k.startswith("backbone") and "running" in k}
    assert "backbone.stages.3.blocks.0.mlp.fc1.weight" in moved and "classify.1.weight" in moved
    assert "only with --init" in mistake(capsys, *more, "--out", tmp_path / "none")
    with pytest.raises(UserError, match="under a head"):
        create_model("glnet_pico", checkpoint=trained)
    classifier = timm.create_model("glnet_pico", dims=(32,) * 4, depths=(1,) * 4, slot_grid=(2, 2), num_classes=3)
    assert "classifier new" in load_body(classifier, trained)
    assert torch.equal(classifier.stem[0].weight, before["backbone.stem.0.weight"])


def test_mistakes(trained: Path, squares: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with_classes = open_maps(str(squares))
    assert with_classes.split("train").classes == ["ground", "square"]
    out = ["--out", tmp_path / "x"]
    assert "scales" in mistake(capsys, "train", *QUICK, "--data", squares, *out, "--scales", "[2, 1]")
    assert "at least 32" in mistake(capsys, "eval", "--checkpoint", trained, "--data", squares, "--window", 8)
    assert "nothing to draw" in mistake(capsys, "predict", photos / "val/red_thing/0.png", "--pictures", tmp_path / "p")
    assert "are of segmentation" in mistake(capsys, "eval", "--data", photos, "--flip")
    assert "head" in mistake(capsys, "train", *QUICK, "--data", squares, *out, "--head", "retinanet")


def test_a_run_names_what_it_cannot_use(squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Before it begins, and goes on without; where nothing of a split can be used, it does not begin."""
    data = tmp_path / "data"
    shutil.copytree(squares, data)
    (data / "train" / "5.png").write_bytes(b"cut off")
    (data / "valannot" / "1.png").write_bytes(b"cut off")
    more = ["train", "--data", data, *QUICK, *ARGS, "--epochs", 1, "--limit-train-batches", 1]
    for run, lines in (("run", 2), ("unasked", 0)):
        asked = [] if lines else ["--check", "false"]
        assert main([*map(str, more), *asked, "--out", str(tmp_path / run)]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("unusable: ")]
        assert len(said) == lines
        assert all(name in line for name, line in zip(("train/5.png: ", "valannot/1.png: "), said, strict=False))
    for path in (data / "val").glob("*.png"):
        path.write_bytes(b"cut off")
    assert "no validation image can be used" in mistake(capsys, *more, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["semantic-fpn", "upernet"])
def test_two_processes_measure_all_of_the_data(head: str, squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """What a run of two processes says of its weights is what one process finds on all images, three here."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(squares, data)
    (data / "val" / "3.png").unlink()
    two = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m glmix.cli train".split()]
    arguments = ["--data", data, "--out", out, *QUICK, *ARGS, "--head", head, "--epochs", 2, "--batch-size", 2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, [*two, *arguments])], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    last = out / "last.safetensors"
    scores = json.loads(output(capsys, "eval", "--checkpoint", last, "--data", data, "--json"))
    said = read_checkpoint(last)[0].info
    assert scores["images"] == 3
    assert {name: said[f"val_{name}"] for name in ("miou", "macc", "aacc")} == pytest.approx(
        {name: scores[name] for name in ("miou", "macc", "aacc")}
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["upernet", "semantic-fpn"])
def test_onnx(name: str, tmp_path: Path):
    """Exported to ONNX with free sides, the scores of an image of any size are the same."""
    runtime = pytest.importorskip("onnxruntime")
    model = shaken(with_head(backbone(), {"name": name, "head_channels": 32}, 4))
    sides = {2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    file, example = tmp_path / "model.onnx", torch.randn(1, 3, 64, 96)
    torch.onnx.export(model, (example,), file, dynamo=True, dynamic_shapes=(sides,), verbose=False)
    session = runtime.InferenceSession(file)
    image = torch.randn(1, 3, 75, 101)
    (scores,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    np.testing.assert_allclose(scores, model(image).numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["semantic-fpn", "upernet"])
def test_scenes_are_learned(head: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The recipe of the quickstart, with both heads."""
    recipe = Path(__file__).parent.parent / "recipes" / "dense" / "scenes_segment.yaml"
    output(capsys, "train", "--config", recipe, "--head", head, "--out", tmp_path / "run")
    scores = json.loads(output(capsys, "eval", "--checkpoint", tmp_path / "run", "--data", "scenes", "--json"))
    assert scores["miou"] >= 90 and scores["images"] == 800


def test_recomputed_activations_change_nothing():
    """--grad-checkpointing: the gradients of a segmenter are the same."""
    images, classes = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = with_head(backbone(), {"name": "semantic-fpn", "head_channels": 16}, 3)
        model.set_grad_checkpointing(recomputed)
        assert model.backbone.stages[0].grad_checkpointing is recomputed
        SegmentLoss(SegmentOptions(), model, description())(model, Batch(images, list(classes), []), 0).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))
