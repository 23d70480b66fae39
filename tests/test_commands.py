"""The commands end to end, in this process, and every mistake as one line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import mistake, output
from PIL import Image

from glmix.cli import main, parse
from glmix.data.prepare import Preparation
from glmix.models import create_model
from glmix.models.description import Description
from glmix.models.glnet import MODEL_NAMES
from glmix.models.weights import read_checkpoint, write_checkpoint
from glmix.tasks.classify import CLASSIFY, ClassifyOptions
from glmix.training.run import prepare


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
    checkpoint, _ = read_checkpoint(run)
    assert checkpoint.model == "glnet_pico" and checkpoint.names == ["blue thing", "red thing"]
    assert "glmix" in checkpoint.info["command"]


def test_eval_repeats_the_number_of_the_run(run: Path, photos: Path, capsys: pytest.CaptureFixture):
    scores = json.loads(output(capsys, "eval", "--checkpoint", run, "--data", photos, "--batch-size", 8, "--json"))
    assert scores["images"] == 8 and scores["skipped"] == []
    info = read_checkpoint(run)[0].info
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
    assert read_checkpoint(copy / "last.safetensors")[0].info["epoch"] == 3


def test_scenes_and_convert(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    output(capsys, "scenes", "--out", tmp_path / "scenes", "--count", 8, "--size", 32)
    assert len(list((tmp_path / "scenes").rglob("*.png"))) == 8
    output(capsys, "convert", run, tmp_path / "small.safetensors")
    assert read_checkpoint(tmp_path / "small.safetensors")[0].classes == ["blue_thing", "red_thing"]


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
    bad = data / "val" / "red_thing" / "text.jpg"
    assert main(["predict", "--checkpoint", str(tmp_path / "run"), str(good), str(bad)]) == 1
    out = capsys.readouterr().out
    assert "skipped" in out and "text.jpg: not an image" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "did you mean train"),
        (["train", "--modle", "glnet_pico"], "did you mean --model"),
        (["train", "--config", "nothere.yaml"], "nothere.yaml: --config: there is no such file"),
        (["eval", "--data", "{photos}", "--scales", "0.5"], "in brackets"),
        (["predict", "x.jpg", "--checkpoint", "nowhere"], "no model 'nowhere' (`glmix models` lists all)"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--epochs", "0"], "above 0"),
        (["train", "--image-size", "16"], "at least 32"),
        (["train", "--model", "glnet_pica", "--data", "{photos}"], "did you mean glnet_pico"),
        (["train", "--data", "{tmp}/none"], "no such folder"),
        (["train", "--data", "{photos}", "--batch-size", "100"], "fewer than a batch"),
        (["train", "--config", "{tmp}/none.yaml"], "none.yaml"),
        (["train", "--config", "{tmp}/bad.yaml"], "epoch"),
        (["train", "--data", "{photos}", "--model_args", "{{slots: 3}}", "--batch-size", "8"], "slots"),
        (["train", "--seed", "-1"], "between 0 and 4294967295"),
        (["train", "--seed", "5000000000"], "between 0 and 4294967295"),
        (["train", "--min-lr", "-1"], "at least 0"),
        (["train", "--min-lr", "0.1"], "min_lr 0.1 is above lr"),
        (["train", "--lr-batch", "-5"], "at least 0"),
        (["train", "--ema", "1.0"], "below 1"),
        (["train", "--drop-path", "1.5"], "between 0 and 1"),
        (["train", "--start-size", "256"], "start_size 256 is above image_size 128"),
        (["train", "--eval-size", "20"], "0 or at least 32"),
        (["train", "--precision", "fp8"], "one of auto, bf16, fp16, fp32, not fp8"),
        (["train", "--precision", "fp16"], "--precision fp16 needs CUDA"),
        (["train", "--epochs", "1.5"], "epochs must be a whole number, not 1.5"),
        (["train", "--lr", "inf"], "lr must be above 0"),
        (["train", "--weight-decay", "inf"], "weight_decay must be at least 0"),
        (["train", "--task", "token-label", "--data", "{photos}", "--batch-size", "8"], "needs --token-labels"),
        (["train", "--auto-augment", "rand-m99x", "--data", "{photos}", "--batch-size", "8"], "no policy of timm"),
        (["train", "--model-args", "{{num_classes: 3}}", "--data", "{photos}", "--batch-size", "8"], "leave it out"),
        (["train", "--model-args", "{{in_chans: 4}}", "--data", "{photos}", "--batch-size", "8"], "of 4 channels"),
        (["train", "--model-args", "{{dims: [0, 0, 0, 0]}}", "--data", "{photos}", "--batch-size", "8"], "of 32"),
        (["train", "--model-args", "{{depths: [1, 1]}}", "--data", "{photos}", "--batch-size", "8"], "as many"),
        (
            ["train", "--model-args", "{{slot_grid: [1.5, 2]}}", "--data", "{photos}", "--batch-size", "8"],
            "such as 7 7",
        ),
        (["eval", "--data", "{photos}", "--workers", "-5"], "workers must be at least -1"),
        (["train", "--strategy", "fsdp", "--ema", "0"], "--strategy fsdp needs CUDA"),
        (["train", "--sync-bn"], "--sync-bn needs CUDA"),
        (["train", "--dense-weight", "0.3"], "dense"),
        (["train", "--task", "clasify"], "did you mean classify"),
        (["train", "--task", "token-label", "--mixup", "0.3"], "mixup and cutmix to 0"),
        (["train", "--config", "{tmp}/bounds.yaml"], "bounds.yaml: epochs must be above 0"),
        (["train", "--config", "{tmp}/bad.yaml"], "bad.yaml: "),
        (["train", "--model", "glnet_pico.nonsense", "--data", "{photos}"], "none; glnet_pico_tklb.imagenette"),
        (["eval", "--data", "{photos}", "--slot-grid", "3", "3", "3"], "slot_grid"),
        (["eval", "--data", "{photos}", "--slot-grid", "0"], "at least 1"),
        (["eval", "--checkpoint", "{run}", "--data", "{photos}", "--slot-grid", "1000"], "slots"),
        (["eval", "--data", "{photos}", "--task", "detect"], "the task is the checkpoint's"),
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
    (tmp_path / "bounds.yaml").write_text("epochs: 0\n")
    (tmp_path / "half.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:5000])
    for name in ("cat", "dog"):
        (tmp_path / "others" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "others" / name / "1.png")
    assert says in mistake(capsys, *[a.format(tmp=tmp_path, run=run, photos=photos) for a in arguments])


def test_a_mistake_leaves_no_run_behind(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for more in (["--data", tmp_path / "none"], ["--data", photos, "--model_args", "{dims: 3}", "--batch-size", 8]):
        mistake(capsys, "train", "--out", tmp_path / "run", *more)
        assert not (tmp_path / "run").exists()


def test_the_installed_command_shows_help(capsys: pytest.CaptureFixture):
    command = Path(sys.executable).with_name("glmix")
    shown = subprocess.run(
        [command, "train", "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert shown.returncode == 0 and "--batch-size" in shown.stdout and "Traceback" not in shown.stderr
    assert not re.search(r"--\w+_\w+", shown.stdout)  # as documented, and as people type
    assert "{true" not in shown.stdout and "whole number, above 0" in shown.stdout
    with pytest.raises(SystemExit):
        parse("predict", ["--help"])
    assert re.search(r"sources\s+images, folders", capsys.readouterr().out), "what stands without an option is told of"
    for title in ("the run:", "the model:", "optimisation:", "images and their augmentation:", "the machine:"):
        assert title in shown.stdout


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
    info = read_checkpoint(run)[0].info
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


@pytest.mark.parametrize(("arguments", "says"), [
    (["train", "--auto-augment", "foo", "--data", "PHOTOS", "--batch-size", 8], "foo: no policy of timm"),
    (["train", "--color-jitter", -3], "color_jitter must be at least 0"),
    (["train", "--out", ""], "out is empty"), (["train", "--data", ""], "data is empty"),
    (["train", "--crop-scale", 2], "crop_scale must be above 0 and at most 1"),
    (["train", "--layer-decay", 0], "layer_decay must be above 0"),
    (["train", "--workers", -7], "workers must be at least -1"), (["train", "--batch-size", 1], "at least 2"),
    (["train", "--checkpoint-steps", -5], "checkpoint_steps must be at least 0"),
    (["train", "--config", "PICTURE"], "a recipe is YAML"),
    (["eval", "--data", "scenes", "--batch-size", -1], "at least 1, or 0 for that of the run"),
    (["eval", "--data", "scenes", "--limit", -3], "at least 1, or 0 for all"),
    (["eval", "--task", "weak-segment", "--data", "scenes", "--maps", "foo"], "maps must be one of gradient, grad-cam, cam, not foo"),
    (["study"], "arguments are required: study (integration, clustering"),
    (["predict", "--top", 0, "PICTURE"], "--top 0: at least one"),
    (["predict", "--checkpoint", "glnet_pico.foo", "PICTURE"], "glnet_pico_tklb.imagenette"),
], ids=lambda a: " ".join(str(w) for w in a) if isinstance(a, list) else "")  # fmt: skip
def test_more_mistakes(
    arguments: list, says: str, photos: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    stands_for = {"PICTURE": next((photos / "val").rglob("*.png")), "PHOTOS": photos}
    assert says in mistake(capsys, *(stands_for.get(a, a) for a in arguments))


@pytest.mark.parametrize("grid", [["3"], ["3", "3"], ["3,3"], ["3x3"], ["[3,3]"]])
def test_a_slot_grid_as_people_write_it(grid: list[str]):
    _, options = parse("eval", ["--data", "x", "--slot-grid", *grid, "--limit", "4"])
    assert tuple(options["slot_grid"]) == (3, 3) and options["limit"] == 4


def sorted_halves(root: Path) -> Path:
    """Many of the first class, few of the second, as class folders come: sorted."""
    for name, value, count in (("a", 30, 40), ("b", 220, 40)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40), (value, 255 - value, i)).save(root / name / f"{i:02}.png")
    return root


def test_a_limit_measures_all_classes(tmp_path: Path, capsys: pytest.CaptureFixture):
    """An untrained network that sees but two colours gives one answer each; a limit sees both of them."""
    data = sorted_halves(tmp_path / "data")
    model = create_model("glnet_pico", num_classes=2)
    with torch.no_grad():  # always says the first class
        model.head.fc.weight.zero_()
        model.head.fc.bias.copy_(torch.tensor([1.0, 0.0]))
    described = Description("classify", "glnet_pico", {}, ["a", "b"], ["a", "b"], Preparation(size=(32, 32)))
    write_checkpoint(tmp_path / "a.safetensors", described, model.state_dict())
    for limit in (8, 10, 30):
        scores = json.loads(output(capsys, "eval", "--checkpoint", tmp_path / "a.safetensors", "--data", data,
                                   "--limit", limit, "--json", "--workers", 0))  # fmt: skip
        assert scores["images"] == limit and scores["top1"] == 50


def test_a_validation_limit_and_slot_health_see_all_classes(tmp_path: Path):
    data = sorted_halves(tmp_path / "data")
    options = ClassifyOptions(data=str(data), out=str(tmp_path / "run"), batch_size=4, limit_val_batches=1, workers=0,
                              image_size=32)  # fmt: skip
    _, (_, validation) = prepare(CLASSIFY, options)
    (batch,) = list(validation)
    assert set(batch.targets.tolist()) == {0, 1}


def test_shuffled_slots_are_worth_less(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The shipped weights on scenes they never saw: other logits, and those of slots rolled by hand."""
    from glmix.models import load
    from glmix.training.evaluate import shuffled_slots

    model, _ = load("glnet_pico_tklb.imagenette")
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(image)
        with shuffled_slots(model):
            shuffled = model(image)
        again = model(image)
        for mixer in model.slot_mixers().values():
            mixer.slot_proj.register_forward_pre_hook(lambda *_: None)
            attend = mixer.attend
            mixer.attend = lambda slots, attend=attend: torch.cat([attend(slots)[:, 25:], attend(slots)[:, :25]], 1)
        by_hand = model(image)
    assert torch.equal(plain, again)
    assert (plain - shuffled).abs().max() > 0.05
    assert torch.allclose(shuffled, by_hand, atol=1e-4)


def test_files_added_since_are_no_validation_images(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A run on data without splits holds some images back; one more file, and eval still takes those alone."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(photos / "train", data)
    options = "--epochs 1 --batch-size 8 --image-size 32 --workers 0 --lr 1e-3".split()
    output(capsys, "train", "--data", data, "--out", run, *options)
    before = json.loads(output(capsys, "eval", "--checkpoint", run, "--data", data, "--json"))
    shutil.copy(photos / "val" / "red_thing" / "1.png", data / "red_thing" / "added.png")
    assert main(["eval", "--checkpoint", str(run), "--data", str(data), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == before
    assert "held out in training" in shown.err and "1 are new since" in shown.err
    shutil.move(data, tmp_path / "other" / "data")  # elsewhere, and named by the folder around it
    assert json.loads(output(capsys, "eval", "--checkpoint", run, "--data", tmp_path / "other", "--json")) == before


def test_weights_without_class_names(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    model = create_model("glnet_pico", num_classes=2)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    command = ["eval", "--checkpoint", str(tmp_path / "a.pth"), "--data", str(photos), "--image-size", "32", "--json"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["images"] == 8
    assert "name no classes" in shown.err and "order" in shown.err


def test_predictions_come_as_they_are_made_with_name_and_reason_apart(run: Path, photos: Path, tmp_path: Path, capsys):
    odd = tmp_path / "a: b.png"
    shutil.copy(next((photos / "val").rglob("*.png")), odd)
    (tmp_path / "c: d.jpg").write_text("no image")
    assert main(["predict", "--checkpoint", str(run), str(tmp_path / "c: d.jpg"), str(odd), "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(tmp_path / "c: d.jpg"), str(odd)]
    assert rows[0]["error"].startswith("not an image") and "predictions" in rows[1]


def glmix(*arguments: object, **more) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "glmix.cli", *map(str, arguments)], capture_output=True, timeout=300, **more
    )


def test_a_reader_that_goes_away_is_no_traceback(run: Path, photos: Path):
    images = " ".join(str(p) for p in sorted((photos / "val").rglob("*.png")))
    shell = f"{sys.executable} -m glmix.cli predict --checkpoint {run} {images} | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300)
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


@pytest.mark.parametrize("words", [[], ["--help"], ["models"]], ids=str)
def test_nobody_reads_at_all(words: list[str]):
    """As `python -m glmix`, which is the command too."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "glmix", *words], stdout=write, stderr=subprocess.PIPE, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_training_outlives_its_reader(photos: Path, tmp_path: Path):
    options = "--epochs 2 --batch-size 8 --image-size 32 --workers 0 --lr 1e-3"
    shell = f"{sys.executable} -m glmix.cli train --data {photos} --out {tmp_path / 'run'} {options} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ""
    assert (tmp_path / "run" / "report.html").exists()
    assert read_checkpoint(tmp_path / "run" / "last.safetensors")[0].info["epoch"] == 2


def test_streams_that_were_closed_before_it_began(run: Path, photos: Path, tmp_path: Path):
    picture = next((photos / "val").rglob("*.png"))
    for more in (
        ["predict", "--checkpoint", run, picture],
        ["models"],
        ["eval", "--checkpoint", run, "--data", photos],
    ):
        command = [sys.executable, "-m", "glmix.cli", *map(str, more)]
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, timeout=300)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_names_that_no_terminal_can_show(run: Path, photos: Path, tmp_path: Path):
    """A terminal that knows ASCII alone, and a name that is no text in any encoding."""
    picture = next((photos / "val").rglob("*.png"))
    names = [os.fsencode(tmp_path) + b"/caf\xc3\xa9.png", os.fsencode(tmp_path) + b"/caf\xe9.png"]
    for name in names:
        shutil.copy(picture, os.fsdecode(name))
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for more, environment in (((), ascii_only), (("--json",), os.environ | {"PYTHONIOENCODING": "utf-8"})):
        command = [sys.executable, "-m", "glmix.cli", "predict", "--checkpoint", str(run), *names, *more]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 2
    for more, environment in (([*names, "--report"], ascii_only), (["--folder", os.fsencode(tmp_path)], os.environ)):
        command = [sys.executable, "-m", "glmix.cli", "explain", "--checkpoint", str(run), *more]
        command += ["--out", os.fsencode(tmp_path) + b"/slots\xe9"]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    data = os.fsencode(tmp_path) + b"/d\xe9/"
    shutil.copytree(photos, os.fsdecode(data))
    options = "--epochs 1 --batch-size 8 --image-size 32 --workers 0".split()
    for out, status in ((os.fsencode(tmp_path) + b"/run", 0), (data + b"run", 2)):
        command = [sys.executable, "-m", "glmix.cli", "train", "--data", data, "--out", out, *options]
        done = subprocess.run(command, capture_output=True, env=ascii_only, timeout=300)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr


def test_a_strangers_repository_is_not_recorded(tmp_path: Path):
    """The package copied into somebody's own repository."""
    import glmix as package

    shutil.copytree(Path(package.__file__).parent, tmp_path / "lib" / "glmix")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*git, *command], check=True)
    code = "from glmix.training.run import git_state; import glmix; print(glmix.__file__, [git_state()])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str(tmp_path / "lib" / "glmix" / "__init__.py"), "['']"]


def test_another_network_of_timm(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Trained, measured and started from by the same commands, to compare with; it has no slots to look at."""
    more = "--model test_convnext --epochs 1 --batch-size 8 --image-size 64 --workers 0 --precision fp32".split()
    output(capsys, "train", "--data", photos, "--out", tmp_path / "one", *more)
    scores = json.loads(output(capsys, "eval", "--checkpoint", tmp_path / "one", "--data", photos, "--json"))
    info = read_checkpoint(tmp_path / "one")[0].info
    assert scores["top1"] == info["val_top1"]
    begun = ["--init", tmp_path / "one", "--layer-decay", 0.8]
    output(capsys, "train", "--data", photos, "--out", tmp_path / "two", *more, *begun)
    image = next(photos.rglob("*.png"))
    assert "thing" in output(capsys, "predict", image, "--checkpoint", tmp_path / "two")
    for words in (["explain", image], ["slots", "--data", "scenes"], ["eval", "--data", photos, "--shuffle-slots"]):
        assert "no G" in mistake(capsys, *words, "--checkpoint", tmp_path / "one")
    assert "weights come" in mistake(capsys, "train", "--data", photos, "--model", "convnext_atto.d2_in1k")


def test_a_run_keeps_its_weights_and_their_average(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Both are measured, each file with its own figure; the folder means the better one."""
    more = "--epochs 2 --batch-size 8 --image-size 32 --workers 0 --precision fp32 --ema 0.5 --lr 1e-3".split()
    output(capsys, "train", "--data", photos, "--out", tmp_path / "run", *more)
    figures = {}
    for name in ("last", "last_ema"):
        path = tmp_path / "run" / f"{name}.safetensors"
        scores = json.loads(output(capsys, "eval", "--checkpoint", path, "--data", photos, "--json"))
        info = read_checkpoint(path)[0].info
        assert (scores["top1"], scores["loss"]) == (info["val_top1"], info["val_loss"])
        figures[name] = scores["loss"]
    assert figures["last"] != figures["last_ema"]
    row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    values = dict(zip(row[0].split(","), row[-1].split(","), strict=True))
    assert float(values["val_loss"]) == pytest.approx(figures["last"], abs=1e-5)
    assert float(values["val_ema_loss"]) == pytest.approx(figures["last_ema"], abs=1e-5)

    for better, worse in (("best", "best_ema"), ("best_ema", "best")):
        for name, top1 in ((better, 90.0), (worse, 80.0)):
            path = tmp_path / "run" / f"{name}.safetensors"
            description, tensors = read_checkpoint(path)
            description.info |= {"val_top1": top1, "which": name}
            write_checkpoint(path, description, tensors)
        assert read_checkpoint(tmp_path / "run")[0].info["which"] == better
