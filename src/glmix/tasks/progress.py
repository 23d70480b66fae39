"""What a run shows: a line per epoch, curves at the end."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from matplotlib.figure import Figure


class EpochLines(pl.Callback):
    """One line per epoch: loss, accuracy, speed, time left. Also readable in a file, where a bar is not."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self.started
        batches = int(trainer.num_training_batches)
        speed = batches * module.options.batch_size * trainer.world_size / seconds
        left = int(seconds * (int(trainer.max_epochs or 0) - trainer.current_epoch - 1))
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        parts += [f"loss {metrics['train_loss_epoch']:.3f}"] if "train_loss_epoch" in metrics else []
        parts += [f"val top-1 {metrics['val_top1']:.1f} %"] if "val_top1" in metrics else []
        parts += [f"{speed:.0f} images/s", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"]
        print("  ".join(parts), file=sys.stderr, flush=True)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of a run's metrics.csv: name to (epoch from 1, value), the last value of each epoch."""
    curves: dict[str, dict[int, float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    curves.setdefault(name, {})[int(row["epoch"]) + 1] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def plot_curves(metrics: Path, picture: Path) -> None:
    """Loss, accuracy and slot entropy over the epochs, from metrics.csv to a PNG."""
    curves = read_metrics(metrics)
    figure = Figure(figsize=(12, 3.4), dpi=120, layout="constrained")
    losses, accuracy, slots = figure.subplots(1, 3)
    for axis, names, title in (
        (losses, ("train_loss_epoch", "val_loss"), "loss"),
        (accuracy, ("val_top1", "val_top5"), "validation accuracy, %"),
    ):
        for name in names:
            if name in curves:
                axis.plot(*zip(*curves[name], strict=True), marker=".", label=name)
        axis.set_title(title)
        axis.legend()
    for name, points in curves.items():
        if name.endswith("assignment_entropy"):
            slots.plot(*zip(*points, strict=True), marker=".", label=name.split("/")[1].removeprefix("stages."))
    slots.set_title("assignment entropy per block (1: idle slots)")
    slots.set_ylim(0, 1.02)
    slots.legend(fontsize=7)
    for axis in (losses, accuracy, slots):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    figure.savefig(picture)
