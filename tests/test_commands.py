"""The commands end to end, in this process, and every mistake as one line."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from glmix.cli import main
from glmix.models.glnet import MODEL_NAMES
from glmix.models.weights import read_checkpoint


def output(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line that a mistake gets."""
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("glmix: "), lines
    return lines[0]


def test_run_folder_is_complete(run: Path):
    for name in (
        "best.safetensors",
        "last.safetensors",
        "resume.ckpt",
        "config.yaml",
        "metrics.csv",
        "curves.png",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3
    checkpoint = read_checkpoint(run)
    assert checkpoint.model == "glnet_pico" and checkpoint.names == ["blue thing", "red thing"]
    assert "glmix" in checkpoint.info["command"]


def test_eval_repeats_the_number_of_the_run(run: Path, photos: Path, capsys: pytest.CaptureFixture):
    scores = json.loads(output(capsys, "eval", "--checkpoint", run, "--data", photos, "--batch-size", 8, "--json"))
    assert scores["images"] == 8 and scores["skipped"] == []
    info = read_checkpoint(run).info
    assert scores["top1"] == info["val_top1"] and scores["loss"] == info["val_loss"]
    assert "top-1" in output(capsys, "eval", "--checkpoint", run / "last.safetensors", "--data", photos / "val")


def test_predict_names_what_it_sees(run: Path, photos: Path, capsys: pytest.CaptureFixture):
    images = sorted((photos / "val").rglob("*.png"))
    rows = [json.loads(r) for r in output(capsys, "predict", "--checkpoint", run, *images, "--json").splitlines()]
    assert [row["image"] for row in rows] == [str(i) for i in images]
    for row in rows:
        assert {p["name"] for p in row["predictions"]} == {"red thing", "blue thing"}
        assert math.isclose(sum(p["probability"] for p in row["predictions"]), 1, abs_tol=1e-3)
    assert "thing" in output(capsys, "predict", images[0], "--checkpoint", run)


def test_explain_writes_a_picture(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    image = next((photos / "val").rglob("*.png"))
    out = tmp_path / "slots"
    text = output(capsys, "explain", "--checkpoint", run, image, "--out", out, "--block", 0, "--image_size=64")
    assert str(out / f"{image.stem}.slots.png") in text
    with Image.open(out / f"{image.stem}.slots.png") as picture:
        assert min(picture.size) > 300


def test_models_lists_every_variant(capsys: pytest.CaptureFixture):
    table = json.loads(output(capsys, "models", "--json"))
    assert set(table) == set(MODEL_NAMES)
    for name, row in table.items():
        if row["published"]:
            assert row["gmacs"] == pytest.approx(row["published"]["gmacs"], rel=0.012), name
            assert row["params_m"] == pytest.approx(row["published"]["params_m"], abs=0.6), name
    assert 2 < table["glnet_pico"]["params_m"] < 3
    assert "83.7" in output(capsys, "models")


def test_resume_goes_on(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    more = ["train", "--config", copy / "config.yaml", "--out", copy, "--epochs", 3]
    assert "already" in mistake(capsys, *more)
    output(capsys, *more, "--resume")
    assert read_checkpoint(copy / "last.safetensors").info["epoch"] == 3


def test_scenes_and_convert(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output(capsys, "scenes", "--out", tmp_path / "scenes", "--count", 8, "--size", 32)
    assert len(list((tmp_path / "scenes").rglob("*.png"))) == 8
    output(capsys, "convert", run, tmp_path / "small.safetensors")
    assert read_checkpoint(tmp_path / "small.safetensors").classes == ["blue_thing", "red_thing"]


def test_a_bad_image_never_ends_a_run(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for split in ("train", "val"):
        (data / split / "red_thing" / "text.jpg").write_text("not an image")
        (data / split / "blue_thing" / "empty.png").touch()
    options = "--epochs 1 --batch-size 8 --image-size 32 --workers 0 --limit-val-batches 0".split()
    out = output(capsys, "train", "--data", data, "--out", tmp_path / "run", *options)
    assert "skipped 4 unusable" in out and "text.jpg: not an image" in out and "empty.png: empty file" in out
    scores = json.loads(output(capsys, "eval", "--checkpoint", tmp_path / "run", "--data", data, "--json"))
    assert scores["images"] == 8 and len(scores["skipped"]) == 2
    good = next((photos / "val").rglob("*.png"))
    out = output(capsys, "predict", "--checkpoint", tmp_path / "run", good, data / "val" / "red_thing" / "text.jpg")
    assert "skipped" in out and "text.jpg: not an image" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean train"),
        (["train", "--modle", "glnet_pico"], "did you mean --model"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--epochs", "0"], "above 0"),
        (["train", "--image-size", "16"], "at least 32"),
        (["train", "--model", "glnet_pica", "--data", "{photos}"], "did you mean glnet_pico"),
        (["train", "--data", "{tmp}/none"], "no such folder"),
        (["train", "--data", "{photos}", "--batch-size", "100"], "fewer than a batch"),
        (["train", "--config", "{tmp}/none.yaml"], "none.yaml"),
        (["train", "--config", "{tmp}/bad.yaml"], "epoch"),
        (["train", "--data", "{photos}", "--model_args", "{{slots: 3}}", "--batch-size", "8"], "slots"),
        (["train", "--resume", "--out", "{tmp}/none"], "nothing to resume"),
        (["eval", "--data", "{photos}"], "not among the model's 10 classes"),
        (["eval"], "data"),
        (["eval", "--checkpoint", "{tmp}/none.safetensors", "--data", "{photos}"], "no such checkpoint"),
        (["eval", "--checkpoint", "{tmp}", "--data", "{photos}"], "holds no best.safetensors"),
        (["eval", "--checkpoint", "{tmp}/half.safetensors", "--data", "{photos}"], "damaged or half-written"),
        (["eval", "--checkpoint", "glnet_4g", "--data", "{photos}"], "github.com/rayleizhu/GLMix"),
        (["eval", "--checkpoint", "{run}", "--data", "{tmp}/others"], "not among the model's 2 classes"),
        (["eval", "--checkpoint", "{run}", "--data", "{tmp}/others", "--image-size", "8"], "below 32"),
        (["predict", "--checkpoint", "{run}", "{tmp}/none.jpg"], "none of the images"),
        (
            ["explain", "--checkpoint", "{run}", "--block", "99", "--out", "{tmp}/x", "{tmp}/none.jpg"],
            "no GLMix block 99",
        ),
        (["convert", "{run}", "{tmp}/x.pth"], "must end in .safetensors"),
        (["scenes", "--out", "{tmp}/x", "--count", "0"], "at least 1 scene"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistakes(
    arguments: list[str], says: str, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "bad.yaml").write_text("epoch: 3\n")
    (tmp_path / "half.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:5000])
    for name in ("cat", "dog"):
        (tmp_path / "others" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "others" / name / "1.png")
    assert says in mistake(capsys, *[a.format(tmp=tmp_path, run=run, photos=photos) for a in arguments])


def test_the_installed_command_shows_help():
    command = Path(sys.executable).with_name("glmix")
    shown = subprocess.run(
        [command, "train", "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert shown.returncode == 0 and "--batch_size" in shown.stdout and "Traceback" not in shown.stderr


def test_a_run_goes_on_with_its_own_options(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    options = "--epochs 1 --batch-size 8 --image-size 32 --workers 0 --lr 1e-3 --seed 5".split()
    output(capsys, "train", "--data", photos, "--out", run, *options)
    output(capsys, "train", "--resume", "--out", run, "--epochs", 2)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["data"], config["epochs"], config["image_size"], config["seed"]) == (str(photos), 2, 32, 5)
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("2,")
    for option, value in (("--model", "glnet_nano"), ("--lr", 0.1), ("--batch-size", 4)):
        message = mistake(capsys, "train", "--resume", "--out", run, option, value)
        assert "was begun with" in message and str(value) in message
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    shutil.copytree(photos / "train" / "red_thing", more / "train" / "third_thing")
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run), "--data", str(more), "--epochs", "3"]) == 2
    assert "another model or number of classes" in capsys.readouterr().err.splitlines()[-1]


def test_eval_takes_what_the_run_held_out(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    data, run = photos / "train", tmp_path / "run"
    options = "--epochs 1 --batch-size 8 --image-size 32 --workers 0 --lr 1e-3".split()
    output(capsys, "train", "--data", data, "--out", run, *options)
    info = read_checkpoint(run).info
    scores = json.loads(output(capsys, "eval", "--checkpoint", run, "--data", data, "--json"))
    assert scores["top1"] == info["val_top1"] and scores["loss"] == info["val_loss"] and scores["images"] < 24
    everything = json.loads(output(capsys, "eval", "--checkpoint", run, "--data", photos / "val", "--json"))
    assert everything["images"] == 8  # other data, all of it


def test_features_of_a_run(run: Path):
    import glmix

    features = glmix.create_model("glnet_pico", checkpoint=run, features_only=True)
    whole = glmix.create_model("glnet_pico", checkpoint=run)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(features.eval()(x), whole.eval().forward_intermediates(x, intermediates_only=True)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("arguments", [
    ["train", "--auto-augment", "foo"], ["train", "--color-jitter", -3], ["train", "--out", ""], ["train", "--data", ""],
    ["train", "--crop-scale", 2], ["train", "--layer-decay", 0], ["train", "--workers", -7], ["train", "--batch-size", 1],
    ["train", "--checkpoint-steps", -5], ["train", "--config", "PICTURE"], ["eval", "--data", "scenes", "--batch-size", -1],
    ["eval", "--data", "scenes", "--limit", -3], ["predict", "--top", 0, "PICTURE"],
    ["predict", "--checkpoint", "glnet_pico.foo", "PICTURE"],
], ids=lambda a: " ".join(str(w) for w in a))  # fmt: skip
def test_more_mistakes(arguments: list, photos: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    picture = next((photos / "val").rglob("*.png"))
    mistake(capsys, *(picture if a == "PICTURE" else a for a in arguments))
