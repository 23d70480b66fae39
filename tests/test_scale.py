"""Several processes, gradient accumulation, recipes' switches: the same training, however it is spread."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from glmix.cli import main
from glmix.models import create_model
from glmix.models.description import Description
from glmix.models.weights import read_checkpoint, write_checkpoint
from glmix.tasks.classify import CLASSIFY, ClassifyOptions
from glmix.training.processes import started
from glmix.training.progress import read_rows
from glmix.training.run import prepare

OPTIONS = (
    "--epochs 3 --image-size 32 --precision fp32 --workers 0 --ema 0 --drop-path 0.1 --mixup 0.4 --cutmix 1 "
    "--mix-prob 0.8 --warmup-epochs 1 --lr 2e-3"
).split()
OPTIONS += ["--model-args", "{dims: [32, 32, 32, 32], depths: [1, 1, 2, 1]}"]


TORCHRUN = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m glmix.cli".split()]


def losses(out: Path) -> list[float]:
    return [float(row["train_loss"]) for row in read_rows(out / "metrics.csv")]


def train(photos: Path, out: Path, *more: str) -> None:
    assert main(["train", "--data", str(photos), "--out", str(out), *OPTIONS, *more]) == 0


def run_processes(command: list, tmp_path: Path, timeout: float = 300, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_two_processes_are_one_that_accumulates(photos: Path, tmp_path: Path):
    train(photos, tmp_path / "one", "--batch-size", "4", "--accumulate", "2")
    arguments = ["train", "--data", photos, "--out", tmp_path / "two", *OPTIONS, "--batch-size", "4"]
    run_processes([*TORCHRUN, *arguments], tmp_path)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-5)


RECORDER = """
import json, os, sys
from dataclasses import replace
from glmix.tasks.classify import CLASSIFY, ClassifyLoss, ClassifyOptions
from glmix.training.run import fit

data, out, cut = sys.argv[1:4]

class Recording(ClassifyLoss):
    def __call__(self, model, batch, epoch):
        numbers = ((batch.images[:, 0].mean((1, 2)) * 0.229 + 0.485) * 255 / 3.9).round().int().tolist()
        with open(f"{out}.seen", "a") as file:
            file.write(json.dumps([epoch, numbers]) + chr(10))
        return super().__call__(model, batch, epoch)

class Cut(ClassifyLoss):
    batches = 0
    def __call__(self, model, batch, epoch):
        Cut.batches += 1
        if Cut.batches == 12:  # of 8 an epoch: the fourth of the second
            raise KeyboardInterrupt
        return Recording.__call__(self, model, batch, epoch)

Cut.__bases__ = (Recording,)
tiny = {"dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "slot_grid": [2, 2]}
options = ClassifyOptions(data=data, out=out, model_args=tiny, epochs=2, batch_size=8, image_size=32, workers=0,
    precision="fp32", warmup_epochs=0, mixup=0.0, cutmix=0.0, checkpoint_steps=1, resume=cut != "cut")
fit(replace(CLASSIFY, loss=Cut if cut == "cut" else Recording), options)
"""


def test_other_processes_go_on_where_the_run_was(tmp_path: Path):
    """Cut in the middle of an epoch on one process, gone on with on two: no image of the epoch is missed."""
    data, out = tmp_path / "data", tmp_path / "run"
    for i in range(64):
        for split in ("train", "val"):
            (data / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (36, 36), (round(3.9 * i), 90, 90)).save(data / split / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "recorder.py").write_text(RECORDER)
    alone = subprocess.run([sys.executable, tmp_path / "recorder.py", data, out, "cut"], capture_output=True, text=True)
    assert "KeyboardInterrupt" in alone.stderr or alone.returncode, alone.stderr[-2000:]
    run_processes([*TORCHRUN[:-2], tmp_path / "recorder.py", data, out, "on"], tmp_path)
    seen = [json.loads(line) for line in (tmp_path / "run.seen").read_text().splitlines()]
    first, second = ([n for epoch, numbers in seen if epoch == e for n in numbers] for e in (0, 1))
    assert sorted(first) == list(range(64))
    assert set(second) == set(range(64)) and len(second) <= 64 + 8  # a step half done is done again
    assert read_checkpoint(out / "last.safetensors")[0].info["epoch"] == 2


def test_each_process_validates_its_own_part(photos: Path, tmp_path: Path):
    options = ClassifyOptions(data=str(photos), out=str(tmp_path), batch_size=2, image_size=32, workers=0)

    def validated(rank: int, processes: int) -> set[bytes]:
        _, (_, loader) = prepare(CLASSIFY, options, rank, processes)
        return {image.numpy().tobytes() for batch in loader for image in batch.images}

    first, second = validated(0, 2), validated(1, 2)
    assert len(first) == len(second) == 4 and not first & second
    assert first | second == validated(0, 1)


def test_what_other_processes_skip_is_reported(photos: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for name in ("2", "5", "7", "9"):
        (data / "train" / "red_thing" / f"{name}.png").write_text("no image")
    arguments = ["train", "--data", data, "--out", tmp_path / "run", *OPTIONS, "--batch-size", "4"]
    shown = run_processes([*TORCHRUN, *arguments], tmp_path)
    assert "skipped 4 unusable images" in shown
    assert all(f"{name}.png: not an image" in shown for name in ("2", "5", "7", "9"))


def test_a_token_labelled_probe_trains_both_heads(photos: Path, tmp_path: Path):
    more = ["--batch-size", "8", "--linear-probe", "--model_args", "{token_labeling: true}", "--epochs", "1"]
    fresh = create_model("glnet_pico", num_classes=2, token_labeling=True)
    described = Description("classify", "glnet_pico", {"token_labeling": True}, ["cat", "dog"], ["cat", "dog"])
    write_checkpoint(tmp_path / "begun.safetensors", described, fresh.state_dict())
    train(photos, tmp_path / "probe", *more, "--init", str(tmp_path / "begun.safetensors"), "--warmup-epochs", "0")
    before, after = fresh.state_dict(), read_checkpoint(tmp_path / "probe")[1]
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"head.fc.weight", "head.fc.bias", "aux_head.weight", "aux_head.bias"}


def test_a_classifier_of_other_classes_is_not_kept(run: Path, photos: Path, tmp_path: Path, capsys):
    """As many classes, but others; and the same ones in another order, whose rows change places."""
    data = tmp_path / "data"
    for split in ("train", "val"):
        for name, other in (("red_thing", "a cat"), ("blue_thing", "a dog")):
            shutil.copytree(photos / split / name, data / split / other)
    options = ClassifyOptions(data=str(data), out=str(tmp_path / "x"), init=str(run), workers=0, batch_size=4)
    before = read_checkpoint(run)[1]
    model = prepare(CLASSIFY, options)[0].model
    assert not torch.equal(model.head.fc.weight, before["head.fc.weight"])
    assert torch.equal(model.stem[0].weight, before["stem.0.weight"])
    assert "classifier" in capsys.readouterr().err
    description, tensors = read_checkpoint(run)
    turned = replace(description, classes=description.classes[::-1], names=description.names[::-1])
    write_checkpoint(tmp_path / "turned.safetensors", turned, tensors)
    options = replace(options, data=str(photos), init=str(tmp_path / "turned.safetensors"))
    assert torch.equal(prepare(CLASSIFY, options)[0].model.head.fc.weight, before["head.fc.weight"].flip(0))


def test_grad_checkpointing_changes_nothing(photos: Path, tmp_path: Path):
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpointing"])):
        train(photos, tmp_path / name, "--batch-size", "8", "--drop-path", "0", *more)
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_init_replaces_the_head_and_linear_probe_keeps_the_body(run: Path, photos: Path, tmp_path: Path):
    more = ["--batch-size", "8", "--linear-probe", "--drop-path", "0", "--model-args", "{}"]
    train(photos, tmp_path / "probe", "--init", str(run), *more)
    before, after = read_checkpoint(run)[1], read_checkpoint(tmp_path / "probe")[1]
    changed = {k for k in before if not torch.equal(before[k], after[k])}  # the norms' statistics stand still too
    assert changed == {"head.fc.weight", "head.fc.bias"}


def test_fsdp_with_average_is_refused(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["train", "--data", str(photos), "--out", str(tmp_path / "x"), "--strategy", "fsdp"]) == 2
    assert "set ema to 0" in capsys.readouterr().err


def test_run_describes_itself(run: Path):
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and "git" in environment
    row = read_rows(run / "metrics.csv")[-1]
    for name in ("epoch", "train_loss", "val_top1", "lr", "images_per_second", "data_wait_percent", "memory_gb"):
        assert name in row
    assert any(name.endswith("assignment_entropy") for name in row) and any(name.endswith("/scale") for name in row)


TOGETHER = """
import os
import sys
from glmix.cli import main
from glmix.tasks import labelling
labelling.SHARD = 10  # so that there are several to share
run, photos, out = sys.argv[1:]
weights = ["--checkpoint", run, "--batch-size", "4", "--workers", "0"]
first = int(os.environ.get("RANK", "0") == "0")  # which tells by its status of the image that cannot be read
assert main(["predict", photos, *weights, "--out", out + "/a.csv"]) in (0, 1)  # 1 of the first process
assert main(["embed", photos, *weights, "--out", out + "/a.npz"]) in (0, 1)
assert main(["eval", "--data", photos, *weights, "--json", "--report", out + "/report"]) == 0
assert main(["eval", "--data", photos, *weights, "--knn", "--json"]) == 0
assert main(["explain", "--folder", photos, "--checkpoint", run, "--out", out + "/slots"]) == first
assert main(["label-tokens", "--teacher", run, "--data", photos, "--out", out + "/labels", "--size", "64"]) == 0
"""


def test_who_started_several_processes(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    assert started() is None
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert started() == (4, 1)
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert started() == (4, 3)
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "6")):
        monkeypatch.setenv(name, value)
    assert started() == (2, 3)


@pytest.mark.slow
def test_tasks_of_slurm_share_the_work(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Two, with what srun tells each."""
    words = ["predict", str(photos), "--checkpoint", str(run), "--batch-size", "4", "--workers", "0", "--out"]
    assert main([*words, str(tmp_path / "one.csv")]) == 0
    told = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "NODEID": 0, "JOB_ID": 7, "JOB_NAME": "embed"}
    told |= {"NODELIST": "127.0.0.1"}

    def task(rank: int) -> subprocess.Popen:
        own = told | {"PROCID": rank, "LOCALID": rank}
        environment = {f"SLURM_{name}": str(value) for name, value in own.items()}
        command = [sys.executable, "-m", "glmix.cli", *words, str(tmp_path / "two.csv")]
        return subprocess.Popen(command, env=os.environ | environment | {"OMP_NUM_THREADS": "1"})

    assert [process.wait(timeout=300) for process in [task(0), task(1)]] == [0, 0]
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


@pytest.mark.slow
def test_two_processes_use_a_model_as_one_does(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each takes its share, and the files are those of one process: predictions, features, reports, slots, labels."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    (data / "train" / "red_thing" / "3x.png").write_text("no image")
    for split in ("train", "val"):
        for i in range(9):  # more than a page of contact sheets
            shutil.copy(data / split / "red_thing" / "1.png", data / split / "red_thing" / f"more{i}.png")
    (tmp_path / "together.py").write_text(TOGETHER)
    printed = {}
    for name, starter in (("one", [sys.executable]), ("two", TORCHRUN[:-2])):
        (tmp_path / name).mkdir()
        command = [*starter, tmp_path / "together.py", run, data, tmp_path / name]
        said = run_processes(command, tmp_path, timeout=1200)
        printed[name] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert printed["one"][1] == printed["two"][1]
    one, two = printed["one"][0], printed["two"][0]
    assert one["images"] == two["images"] and one["top1"] == two["top1"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) > 50
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert sum(file.suffix == ".safetensors" for file in files) == 4
    for file in files:
        if file.suffix in (".csv", ".npz", ".safetensors") or file.name.startswith("contact"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
