"""Nothing lost: resume points that survive a kill at any moment, and a stop that waits for the step to end.

A resume point is Lightning's checkpoint (weights, their average, optimiser, schedule, progress). It is written beside
its place, synced, then renamed, and the one before is kept. Everything random hangs on (seed, epoch, index) or (seed,
epoch, batch), so a run that goes on from a resume point ends with the weights of one that was never cut.
"""

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

NEWEST, PREVIOUS = "resume.ckpt", "resume-previous.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside, syncs, renames; keeps the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        try:
            with open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.exists() and path.name == NEWEST:
                os.replace(path, path.with_name(PREVIOUS))
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def is_whole(path: Path) -> bool:
    """Whether the file is complete and its checksums (those of the zip format) are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def find_resume_point(folder: Path) -> Path | None:
    """The newest whole resume point of a run, with a warning if a newer one is damaged; None if there is none."""
    for name in (NEWEST, PREVIOUS):
        path = folder / name
        if path.exists():
            if is_whole(path):
                return path
            print(f"glmix: {path} is damaged; going back to the resume point before it", file=sys.stderr)
    return None


class ResumePoints(Checkpoint):
    """Saves a resume point at the end of every epoch, every so many steps, and where the run is told to stop.

    SIGTERM and a first Ctrl-C stop the run after the step under way; a second Ctrl-C stops it at once, which costs no
    more than the steps since the last resume point. In a SLURM job SIGUSR1 does the same and puts the job back into
    its queue (Lightning's own requeueing saves within the signal, in the middle of a step).
    """

    def __init__(self, folder: Path, every_steps: int) -> None:
        self.path, self.every_steps = folder / NEWEST, every_steps
        self.stopped = self.requeue = False
        self._before: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        def stop(signum: int, frame: Any) -> None:
            self.stopped = True
            self.requeue = signum == signal.SIGUSR1
            signal.signal(signal.SIGINT, signal.default_int_handler)

        listened = [signal.SIGINT] + ([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])
        self._before = {number: signal.signal(number, stop) for number in listened}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def told_to_stop(self, trainer: pl.Trainer) -> bool:
        """Whether any process was told to stop: they must agree, since saving takes them all."""
        return trainer.strategy.reduce_boolean_decision(self.stopped or trainer.received_sigterm, all=False)

    def leave(self, trainer: pl.Trainer) -> None:
        if self.requeue and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
        raise SystemExit(143)

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


def position(checkpoint: dict[str, Any], batches_per_epoch: int) -> tuple[int, int]:
    """Epoch and number of its batches already done, where a run goes on from a resume point."""
    done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]
    epoch = checkpoint["epoch"]
    return (epoch + 1, 0) if done >= batches_per_epoch else (epoch, done)
