"""Nothing lost: resume points that survive a kill at any moment, and a stop that waits for the step to end.

A resume point is Lightning's checkpoint (weights, their average, optimiser, progress). It is written beside its place,
synced, then renamed, and the one before is kept. Everything random hangs on (seed, epoch, index) or (seed, epoch,
batch), and the learning rate on the epoch and the step in it, so a run that goes on from a resume point ends with the
weights of one that was never cut.
"""

import os
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from glmix.console import say
from glmix.data.loading import EpochOrder
from glmix.errors import UserError
from glmix.files import check_folder, written_whole
from glmix.models.weights import OF_A_RUN
from glmix.training.options import TrainOptions

NEWEST, PREVIOUS = "resume.ckpt", "resume-previous.ckpt"
SIGUSR1, SIGHUP = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGHUP"))  # None on Windows


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside, syncs, renames; keeps the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with written_whole(path) as file:
            torch.save(checkpoint, file)
            if path.exists() and path.name == NEWEST:
                os.replace(path, path.with_name(PREVIOUS))


def is_whole(path: Path) -> bool:
    """Whether the file is complete, its checksums (those of the zip format) are right, and it can be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception:  # damage can raise any kind
        return False
    return True


def find_resume_point(folder: Path) -> Path | None:
    """The newest whole resume point of a run, with a warning if a newer one is damaged; None if there is none."""
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if path.exists():
            if is_whole(path):
                return path
            say(f"glmix: {path} is damaged; going back to the resume point before it")
    return None


def where_to_begin(out: Path, resume: bool) -> Path | None:
    """The resume point that a run goes on from; None where it begins, as nothing has been learned in `out` yet.

    Raises:
        UserError: there is a run and no `resume`; or one whose resume points are gone, which a new one would overwrite.
    """
    check_folder("--out", out)
    point = find_resume_point(out)
    kept = [name for name in (*OF_A_RUN, NEWEST, PREVIOUS) if (out / name).exists()]
    if point is None and kept:
        another = (
            f"from its weights by --init {out / kept[0]} and another --out"
            if kept[0] in OF_A_RUN
            else "by another --out"
        )
        raise UserError(
            f"{out}: a run is there whose resume points are gone or damaged, so it cannot go on; bring them back, or start "
            f"another {another}"
        )
    if point is not None and not resume:
        raise UserError(f"{out}: a run is there already; go on with it by --resume, or choose another --out")
    if point is None and resume:
        say(f"{out}: nothing to resume, so the run begins")
    return point


class Occupied(UserError):  # noqa: N818  (a state, which may pass)
    """Another process trains in the folder."""


@contextmanager
def occupied(out: Path) -> Iterator[None]:
    """Within it no other process trains in `out`; a lock that goes with its process, where the file system has locks.

    Raises:
        Occupied: another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Occupied(f"{out}: another process trains there now; wait for it, or choose another --out") from error
    except NotImplementedError:  # no locks, as on some clusters
        pass
    try:
        yield
    finally:
        lock.release()


@dataclass
class Position:
    """Where a run stands, in images, so that it can go on with other processes than it was begun with.

    Attributes:
        epoch: epochs that are done.
        images: of the epoch after these, done by all processes together.
    """

    epoch: int
    images: int

    @classmethod
    def now(cls, trainer: pl.Trainer, order: EpochOrder) -> "Position":
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return cls._at(trainer.current_epoch, batches, order)

    @classmethod
    def of(cls, checkpoint: dict[str, Any], order: EpochOrder) -> "Position":
        """That of a resume point; older ones know batches alone, and are taken to be of as many processes as now."""
        if "position" in checkpoint:
            return cls(**checkpoint["position"])
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
        return cls._at(checkpoint["epoch"], batches, order)

    @classmethod
    def _at(cls, epoch: int, batches: int, order: EpochOrder) -> "Position":
        if batches >= order.batches:
            return cls(epoch + 1, 0)
        return cls(epoch, batches * order.batch_size * order.processes)

    def go_on(self, checkpoint: dict[str, Any], order: EpochOrder, options: TrainOptions) -> int:
        """Set the order, and the loops of Lightning's checkpoint, to go on from here.

        Returns:
            The steps of the schedule that are done.

        Raises:
            UserError: more epochs are done than the run is to have.
        """
        if self.epoch > options.epochs:
            raise UserError(
                f"{options.out}: {self.epoch} epochs are done already; --epochs {options.epochs} is below that"
            )
        batches = order.resume_at(self.epoch, self.images)
        steps = self.epoch * order.steps + batches // order.accumulate
        if self.epoch > checkpoint["epoch"]:  # Lightning ends the epoch itself, whose batches are all done
            batches = order.batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        later = batches - progress["ready"]  # not 0 where batches were others; a batch can be ready and not completed
        progress.update({stage: done + later for stage, done in progress.items()})
        checkpoint["lr_schedulers"] = []  # the schedule is that of the options now, at this position
        return steps


class ResumePoints(Checkpoint):
    """Saves a resume point at the end of every epoch, every so many steps, and where the run is told to stop.

    SIGTERM, a closed terminal (SIGHUP, unless nohup ignores it) and a first Ctrl-C stop the run after the step under
    way; a second Ctrl-C stops it at once, which costs no more than the steps since the last resume point. In a SLURM
    job SIGUSR1 does the same and puts the job back into its queue (Lightning's own requeueing saves within the signal,
    in the middle of a step).
    """

    def __init__(self, folder: Path, every_steps: int) -> None:
        self.path, self.every_steps = folder / NEWEST, every_steps
        self.signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        def stop(signum: int, frame: Any) -> None:
            self.signal = signum
            signal.signal(signal.SIGINT, signal.default_int_handler)

        # SIGTERM too: Lightning's own handling of it leaves before anything is saved, in the middle of a step
        listened = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            listened.append(SIGHUP)
        if SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            listened.append(SIGUSR1)
        self._before = {number: signal.signal(number, stop) for number in listened}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def told_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any process was told to stop: they must agree, since saving takes them all."""
        return trainer.strategy.reduce_boolean_decision(bool(self.signal) or trainer.received_sigterm, all=False)

    def leave(self, trainer: pl.Trainer) -> None:
        requeue = "SLURM_JOB_ID" in os.environ and self.signal == SIGUSR1
        if requeue and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        last = batch_idx + 1 >= trainer.num_training_batches
        if not stepped or last:  # an epoch's end saves by itself, after its validation
            return
        stop = self.told_to_stop(trainer)
        if stop or (self.every_steps and trainer.global_step % self.every_steps == 0):
            trainer.save_checkpoint(self.path)
        if stop:
            self.leave(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        if self.told_to_stop(trainer) and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            self.leave(trainer)
