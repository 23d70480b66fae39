"""Several processes, gradient accumulation, recipes' switches: the same training, however it is spread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glmix.cli import main
from glmix.tasks.progress import read_rows

OPTIONS = (
    "--epochs 3 --image-size 32 --precision fp32 --workers 0 --ema 0 --drop-path 0.1 --mixup 0.4 --cutmix 1 "
    "--mix-prob 0.8 --warmup-epochs 1 --lr 2e-3"
).split()


def losses(out: Path) -> list[float]:
    return [float(row["train_loss"]) for row in read_rows(out / "metrics.csv")]


def train(photos: Path, out: Path, *more: str) -> None:
    assert main(["train", "--data", str(photos), "--out", str(out), *OPTIONS, *more]) == 0


def run_processes(command: list, tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_two_processes_are_one_that_accumulates(photos: Path, tmp_path: Path):
    train(photos, tmp_path / "one", "--batch-size", "4", "--accumulate", "2")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "glmix.cli",
    ]
    arguments = ["train", "--data", photos, "--out", tmp_path / "two", *OPTIONS, "--batch-size", "4"]
    run_processes([*torchrun, *arguments], tmp_path)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-5)


def test_lr_is_scaled_and_said(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    train(photos, tmp_path / "run", "--batch-size", "4", "--lr_batch", "8", "--epochs", "1", "--warmup-epochs", "0")
    assert "lr 0.002 for a batch of 8 becomes 0.001 for 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "switch",
    ["--grad-checkpointing", "--precision=bf16", "--repeats=3", "--layer-decay=0.7", "--linear-probe", "--sync-bn"],
)
def test_switches_train(switch: str, photos: Path, tmp_path: Path):
    train(photos, tmp_path / "run", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0", switch)
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_grad_checkpointing_changes_nothing(photos: Path, tmp_path: Path):
    for name, more in (("plain", []), ("checkpointed", ["--grad-checkpointing"])):
        train(photos, tmp_path / name, "--batch-size", "8", "--drop-path", "0", *more)
    assert losses(tmp_path / "checkpointed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_init_replaces_the_head_and_linear_probe_keeps_the_body(run: Path, photos: Path, tmp_path: Path):
    from glmix.models.weights import read_checkpoint

    train(photos, tmp_path / "probe", "--batch-size", "8", "--init", str(run), "--linear-probe", "--drop-path", "0")
    before, after = read_checkpoint(run).state_dict, read_checkpoint(tmp_path / "probe").state_dict
    changed = {k for k in before if not torch.equal(before[k], after[k]) and "running" not in k and "tracked" not in k}
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
