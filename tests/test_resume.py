"""A run that was cut anywhere and resumed ends bitwise as one that never was (on a CPU)."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from glmix.cli import main
from glmix.models.weights import read_checkpoint
from glmix.training import resuming
from glmix.training.module import Trained

# everything random is on: crops, flips, colours, erasing, mixing, drop path, moving average, the grid of slots, repeated augmentation
OPTIONS = (
    "--epochs 3 --batch-size 4 --image-size 32 --precision fp32 --drop-path 0.2 --ema 0.9 --mixup 0.4 --cutmix 1 "
    "--mix-prob 0.8 --color-jitter 0.3 --random-erasing 0.3 --checkpoint-steps 2 --warmup-epochs 1 --slot-grids 1 4"
).split()
OPTIONS += ["--model-args", "{dims: [32, 32, 32, 32], depths: [1, 1, 2, 1]}"]  # saved after every other step


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch):
    """Which takes as long as the run; tests/test_commands.py has it."""
    monkeypatch.setattr("glmix.training.run.write_report", lambda *_: None)


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


def amid_numbers(point: Path) -> int:
    """Where in a resume point the middle of its largest tensor is: between tensors it has bytes that nobody reads."""
    with zipfile.ZipFile(point) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    return point.read_bytes().index(largest) + len(largest) // 2


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
    original = getattr(Trained, hook)

    def cut(self, *args, **kwargs):
        at = args[1] if hook != "validation_step" else 0
        if self.current_epoch == epoch and at == batch:
            raise Cut
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, hook, cut)
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
    content[amid_numbers(newest)] ^= 0xFF  # one flipped byte
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
    data, away, original = tmp_path / "data", tmp_path / "away", getattr(Trained, hook)
    shutil.copytree(photos, data)

    def vanish(self, batch, index):
        result = original(self, batch, index)
        if self.current_epoch == 1 and data.exists():
            data.rename(away)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trained, hook, vanish)
        assert train(data, tmp_path / "run") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"bring {data} back" in message and "No such file" in message and "--resume" in message
    away.rename(data)
    assert train(data, tmp_path / "run", "--resume") == 0
    assert_same(undisturbed, tmp_path / "run")


def test_accumulated_steps_go_on_exactly(photos: Path, tmp_path: Path, monkeypatch):
    """12 batches an epoch, 5 to a step: what is left over is left out, and a run cut between steps repeats the rest."""
    more = ("--accumulate", "5", "--checkpoint-steps", "1", "--batch-size", "2")
    assert train(photos, tmp_path / "whole", *more) == 0
    original = Trained.training_step

    def cut(self, batch, index):
        if self.current_epoch == 1 and index == 6:
            raise Cut
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Trained, "training_step", cut)
        with pytest.raises(Cut):
            train(photos, tmp_path / "cut", *more)
    assert train(photos, tmp_path / "cut", *more, "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert final_state(tmp_path / "whole")["step"] == 3 * 2


def test_more_epochs_stretch_the_schedule(photos: Path, tmp_path: Path):
    """After 2 of 2 epochs, 6 are asked for: from there on the rates are those of a run that was to have 6."""
    from test_learning import watched

    rates = {}
    for name, steps in (("two", [("2", ()), ("6", ("--resume",))]), ("six", [("6", ())])):
        with watched() as seen:
            for epochs, more in steps:
                assert train(photos, tmp_path / name, "--epochs", epochs, *more) == 0
        rates[name] = [next(iter(step.lr.values())) for step in seen]
    assert len(rates["two"]) == len(rates["six"]) == 36
    assert rates["two"][12:] == pytest.approx(rates["six"][12:])
    assert rates["two"][12] > 5e-4


@pytest.mark.parametrize("epochs", ["2", "3"])
def test_the_last_epoch_is_always_validated(epochs: str, photos: Path, tmp_path: Path):
    assert train(photos, tmp_path / "run", "--val-every", "4" if epochs == "3" else "3", "--epochs", epochs) == 0
    assert read_checkpoint(tmp_path / "run" / "last.safetensors")[0].info["epoch"] == int(epochs)


@pytest.fixture
def finished(photos: Path, undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of a run that has ended."""
    shutil.copytree(undisturbed, tmp_path / "finished")
    return tmp_path / "finished"


@pytest.mark.parametrize("place", ["middle", "directory", "end", "names"])
def test_damage_anywhere_means_the_point_before(place: str, photos: Path, finished: Path, capsys):
    """One byte flipped: in the data, in the zip's directory, in a name; or the end cut off."""
    newest = finished / "resume.ckpt"
    content = bytearray(newest.read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[{"middle": amid_numbers(newest), "directory": directory + 10}.get(place, directory + 50)] ^= 0x41
    newest.write_bytes(content[:-30] if place == "end" else content)
    assert train(photos, finished, "--resume", "--epochs", "4") == 0
    assert "is damaged; going back" in capsys.readouterr().err
    assert read_checkpoint(finished / "last.safetensors")[0].info["epoch"] == 4


@pytest.mark.parametrize("loss", ["removed", "damaged"])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_run_without_resume_points_is_not_begun_anew(loss: str, resume, photos: Path, finished: Path, capsys):
    before = {name: (finished / name).read_bytes() for name in ("best.safetensors", "metrics.csv", "config.yaml")}
    for point in finished.glob("resume*.ckpt"):
        point.unlink() if loss == "removed" else point.write_bytes(b"nothing")
    assert train(photos, finished, *resume) == 2
    assert f"--init {finished / 'best.safetensors'}" in capsys.readouterr().err
    assert before == {name: (finished / name).read_bytes() for name in before}


def test_damaged_resume_points_are_kept_where_no_weights_are_yet(photos: Path, finished: Path, capsys):
    """As before the first validation: bytes that may be mended are not written over."""
    for weights in finished.glob("*.safetensors"):
        weights.unlink()
    for point in finished.glob("resume*.ckpt"):
        point.write_bytes(b"nothing")
    assert train(photos, finished, "--resume") == 2
    assert "bring them back" in capsys.readouterr().err
    assert (finished / "resume.ckpt").read_bytes() == b"nothing"


def test_resume_begins_a_missing_run_and_says_so(photos: Path, undisturbed: Path, tmp_path: Path, capsys):
    assert train(photos, tmp_path / "new", "--resume") == 0
    assert "nothing to resume, so the run begins" in capsys.readouterr().err
    assert_same(undisturbed, tmp_path / "new")


def test_a_second_run_in_a_folder_is_refused(photos: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    process = start(photos, out, "--epochs", "40")
    wait_for((out / "resume.ckpt").exists, process)
    assert train(photos, out, "--resume") == 2
    assert "another process trains there" in capsys.readouterr().err
    process.kill()
    process.communicate()
    assert train(photos, out, "--resume", "--epochs", "1") in (0, 2)  # the lock went with its process
    assert "another process" not in capsys.readouterr().err


def test_other_data_is_refused_on_resume(photos: Path, finished: Path, tmp_path: Path, capsys):
    """As many classes, others in name; the same classes, other images; and best stays what it was."""
    renamed, fewer = tmp_path / "renamed", tmp_path / "fewer"
    for split in ("train", "val"):
        for name, other in (("red_thing", "cat"), ("blue_thing", "dog")):
            shutil.copytree(photos / split / name, renamed / split / other)
    shutil.copytree(photos, fewer)
    (fewer / "train" / "red_thing" / "3.png").unlink()
    before = {name: (finished / name).read_bytes() for name in ("best.safetensors", "config.yaml")}
    for data, says in ((renamed, "other classes"), (fewer, "other training images")):
        assert train(data, finished, "--resume", "--epochs", "4") == 2
        assert says in capsys.readouterr().err
    assert before == {name: (finished / name).read_bytes() for name in before}
    shutil.copytree(photos, tmp_path / "moved")
    assert train(tmp_path / "moved", finished, "--resume", "--epochs", "4") == 0


def test_an_option_that_was_given_counts_even_where_it_is_the_usual_one(photos: Path, tmp_path: Path, capsys):
    begun = ("--lr", "1e-3", "--epochs", "1")
    assert train(photos, tmp_path / "run", *begun) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--lr", "0.002"]) == 2
    assert "was begun with lr 0.001, not 0.002" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--epochs", "2", "--workers", "-1"]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["lr"], config["epochs"], config["workers"], config["seed"]) == (1e-3, 2, -1, 0)


def test_fewer_epochs_than_are_done_are_refused(photos: Path, finished: Path, capsys):
    assert train(photos, finished, "--resume", "--epochs", "2") == 2
    assert "3 epochs are done already" in capsys.readouterr().err


def test_config_is_written_whole(photos: Path, finished: Path, monkeypatch, capsys):
    before = (finished / "config.yaml").read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert train(photos, finished, "--resume", "--epochs", "4") == 2
    assert (finished / "config.yaml").read_text() == before


def test_loss_not_finite_stops_with_epoch_and_batch(photos: Path, tmp_path: Path, capsys):
    steep = ["--lr", "1e9", "--clip-grad", "0", "--warmup-epochs", "0"]
    assert train(photos, tmp_path / "run", *steep, "--precision", "bf16") == 2
    said = capsys.readouterr().err
    assert re.search(r"the loss is (nan|inf) in epoch \d+, batch \d+", said)
    advice = ["--resume", *steep, "--precision", "fp32"]
    assert "--precision fp32" in said and train(photos, tmp_path / "run", *advice) == 2
    said = capsys.readouterr().err
    assert "was begun with" not in said  # what it advises is not refused
    assert "--precision fp32" not in said and "with a lower --lr" in said  # nor what was done advised again


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
        [str(c) for c in command],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also where nohup runs the tests
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


@pytest.mark.parametrize("batch", [2, 3])
def test_sigterm_within_an_accumulated_step_waits_for_its_end(batch: int, photos: Path, tmp_path: Path, monkeypatch):
    """A signal at any of the batches of a step, as in the middle of a save, costs nothing."""
    accumulated = ("--accumulate", "2", "--checkpoint-steps", "0")
    assert train(photos, tmp_path / "whole", *accumulated) == 0
    step = Trained.training_step

    def told(self: Trained, images: object, number: int):
        if number == batch and self.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, images, number)

    monkeypatch.setattr(Trained, "training_step", told)
    assert train(photos, tmp_path / "run", *accumulated) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert torch.load(tmp_path / "run" / "resume.ckpt", weights_only=False)["position"] == {"epoch": 0, "images": 16}
    assert train(photos, tmp_path / "run", "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "whole"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True)], ids=str
)
def test_what_stops_a_run_does_so_after_the_step(
    number: int, whole: bool, photos: Path, undisturbed: Path, tmp_path: Path
):
    """Sent to the run alone, or, as `timeout`, SLURM and a closed terminal do, to the processes that load images too."""
    out = tmp_path / "run"
    process = start(photos, out)
    wait_for((out / "resume.ckpt").exists, process)
    (os.killpg if whole else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
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
    assert process.returncode == 128 + signal.SIGUSR1, errors
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
