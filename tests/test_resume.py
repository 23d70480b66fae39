"""A run that was cut anywhere and resumed ends bitwise as one that never was (on a CPU)."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glmix.cli import main
from glmix.tasks import resuming
from glmix.tasks.classification import Classifier

# everything random is on: crops, flips, colours, erasing, mixing, drop path, moving average, repeated augmentation
OPTIONS = (
    "--epochs 3 --batch-size 4 --image-size 32 --precision fp32 --drop-path 0.2 --ema 0.9 --mixup 0.4 --cutmix 1 "
    "--mix-prob 0.8 --color-jitter 0.3 --random-erasing 0.3 --checkpoint-steps 2 --warmup-epochs 1"
).split()


def train(photos: Path, out: Path, *more: str, workers: int = 0) -> int:
    return main(["train", "--data", str(photos), "--out", str(out), "--workers", str(workers), *OPTIONS, *more])


def final_state(out: Path) -> dict:
    checkpoint = torch.load(out / "resume.ckpt", weights_only=False)
    moments = checkpoint["optimizer_states"][0]["state"]
    flat = {f"moment {i} {k}": v for i, state in moments.items() for k, v in state.items()}
    return checkpoint["state_dict"] | flat | {"step": torch.tensor(checkpoint["global_step"])}


def assert_same(one: Path, other: Path) -> None:
    a, b = final_state(one), final_state(other)
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} entries differ: {different[:3]}"


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(photos, out) == 0
    return out


class Cut(Exception):  # noqa: N818  (no error of the program)
    """Stands for a power cut."""


@pytest.mark.parametrize(("hook", "epoch", "batch"), [
    ("training_step", 0, 1),
    ("training_step", 1, 3),
    ("training_step", 2, 5),
    ("validation_step", 1, 0),
    ("optimizer_step", 1, 2),
])  # fmt: skip
def test_cut_and_resumed(
    hook: str, epoch: int, batch: int, photos: Path, undisturbed: Path, tmp_path: Path, monkeypatch
):
    original = getattr(Classifier, hook)

    def cut(self, *args, **kwargs):
        at = args[1] if hook != "validation_step" else 0
        if self.current_epoch == epoch and at == batch:
            raise Cut
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, hook, cut)
        with pytest.raises(Cut):
            train(photos, tmp_path / "run")
    if (tmp_path / "run" / "resume.ckpt").exists():
        assert train(photos, tmp_path / "run", "--resume") == 0
    else:  # cut before the first resume point: nothing to go on from, the same command starts anew
        assert train(photos, tmp_path / "run") == 0
    assert_same(undisturbed, tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]


def test_damaged_newest_point_falls_back(photos: Path, undisturbed: Path, tmp_path: Path, monkeypatch, capsys):
    def cut(self, args, kwargs=None):
        raise Cut

    original = resuming.SafeCheckpointIO.save_checkpoint
    saves = []

    def save_then_cut(self, checkpoint, path, storage_options=None):
        original(self, checkpoint, path, storage_options)
        saves.append(path)
        if len(saves) == 4:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(resuming.SafeCheckpointIO, "save_checkpoint", save_then_cut)
        with pytest.raises(Cut):
            train(photos, tmp_path / "run")
    newest = tmp_path / "run" / "resume.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF  # one flipped byte
    newest.write_bytes(content)
    assert train(photos, tmp_path / "run", "--resume") == 0
    assert "is damaged; going back" in capsys.readouterr().err
    assert_same(undisturbed, tmp_path / "run")


def test_disk_full_while_saving_keeps_the_point_before(
    photos: Path, undisturbed: Path, tmp_path: Path, monkeypatch, capsys
):
    original, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            args[1].write(b"half of it")
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert train(photos, tmp_path / "run") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob(".*.part"))
    assert train(photos, tmp_path / "run", "--resume") == 0
    assert_same(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_vanished_data_stops_the_run_and_it_goes_on(
    hook: str, photos: Path, undisturbed: Path, tmp_path: Path, monkeypatch, capsys
):
    data, away, original = tmp_path / "data", tmp_path / "away", getattr(Classifier, hook)
    shutil.copytree(photos, data)

    def vanish(self, batch, index):
        result = original(self, batch, index)
        if self.current_epoch == 1 and data.exists():
            data.rename(away)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, hook, vanish)
        assert train(data, tmp_path / "run") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"bring {data} back" in message and "No such file" in message and "--resume" in message
    away.rename(data)
    assert train(data, tmp_path / "run", "--resume") == 0
    assert_same(undisturbed, tmp_path / "run")


def test_loss_not_finite_stops_with_epoch_and_batch(photos: Path, tmp_path: Path, capsys):
    assert train(photos, tmp_path / "run", "--lr", "1e9", "--clip-grad", "0", "--warmup-epochs", "0") == 2
    assert re.search(r"the loss is (nan|inf) in epoch \d+, batch \d+", capsys.readouterr().err)


def start(photos: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "glmix.cli",
        "train",
        "--data",
        photos,
        "--out",
        out,
        "--workers",
        "2",
        *OPTIONS,
        *more,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [str(c) for c in command], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def test_sigterm_stops_after_the_step_and_resumes(photos: Path, undisturbed: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = start(photos, out)
    wait_for((out / "resume.ckpt").exists, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 2), errors
    if process.returncode:
        assert "--resume goes on" in errors and "Traceback" not in errors
        assert train(photos, out, "--resume") == 0
    assert_same(undisturbed, out)


def test_preempted_slurm_job_is_requeued_and_goes_on(photos: Path, undisturbed: Path, tmp_path: Path, monkeypatch):
    """With a stand-in for the scheduler: `scontrol` writes down what it is asked."""
    out, asked = tmp_path / "run", tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {asked}\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"JOB_ID": "77", "JOB_NAME": "glnet", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1"}
    job |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost", "JOB_NODELIST": "localhost"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    process = start(photos, out)
    wait_for((out / "resume.ckpt").exists, process)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert asked.read_text().split() == ["requeue", "77"]
    again = start(photos, out, "--resume")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert_same(undisturbed, out)


@pytest.mark.slow
def test_twenty_random_kills(photos: Path, undisturbed: Path, tmp_path: Path):
    """SIGKILL at 20 random moments of one run, mid-epoch and mid-write included, with 2 workers."""
    out, kills, rng = tmp_path / "run", 0, random.Random(0)
    longer = ("--epochs", "40")
    reference = tmp_path / "reference"
    assert train(photos, reference, *longer, workers=2) == 0
    for _ in range(200):
        resume = ("--resume",) if list(out.glob("resume*.ckpt")) else ()
        before = (out / "resume.ckpt").stat().st_mtime_ns if (out / "resume.ckpt").exists() else 0
        process = start(photos, out, *longer, *resume)

        def advanced(before=before):
            point = out / "resume.ckpt"
            return point.exists() and point.stat().st_mtime_ns != before

        if kills < 20:
            wait_for(advanced, process)
            time.sleep(rng.uniform(0, 1.5))
        if kills < 20 and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
            process.wait()
        else:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
            break
    assert kills == 20
    assert_same(reference, out)
