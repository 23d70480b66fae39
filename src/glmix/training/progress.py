"""What a run shows: a line and a row per epoch, curves at the end."""

import csv
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure

from glmix.console import say
from glmix.files import written_whole
from glmix.page import heading, image, listing, table, write_page


class EpochRows(pl.Callback):
    """A line on the terminal and a row of metrics.csv per epoch: losses, figures, speed, wait for data, memory."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self.started = self.batch_ended = self.waited = 0.0
        self.batches = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # a run resumed within an epoch has no start of its own
        if trainer.is_global_zero:  # rows of epochs that are now run again
            write_rows(self.path, [row for row in read_rows(self.path) if int(row["epoch"]) <= trainer.current_epoch])

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = self.batch_ended = time.monotonic()
        self.waited, self.batches = 0.0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.waited += time.monotonic() - self.batch_ended

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_ended = time.monotonic()
        self.batches += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        metrics = trainer.callback_metrics  # on every process: asking for them gathers them
        if not trainer.is_global_zero:
            return
        epoch, epochs = trainer.current_epoch + 1, int(trainer.max_epochs or 0)
        training = max(self.batch_ended - self.started, 1e-9)
        row = {"epoch": epoch} | {k: round(float(v), 6) for k, v in metrics.items() if not k.endswith("_step")}
        if trainer.current_epoch != module.validated_epoch:  # the trainer remembers values of earlier epochs
            row = {k: v for k, v in row.items() if not k.startswith(("val", "slots/"))}
        row["lr"] = float(f"{trainer.optimizers[0].param_groups[-1]['lr']:.4g}")
        row["images_per_second"] = round(self.batches * module.order.batch_size * trainer.world_size / training, 1)
        row["data_wait_percent"] = round(100 * self.waited / training, 1)
        row["memory_gb"] = round(memory_in_use(), 2)
        write_rows(self.path, [*read_rows(self.path), row])
        seconds = int((time.monotonic() - self.started) * (epochs - epoch))
        show = module.task.show
        validated = [
            show({k.removeprefix(f"val{kind}_"): v for k, v in row.items() if k.startswith(f"val{kind}_")})
            for kind in module.kinds
            if f"val{kind}_{module.task.headline}" in row
        ]
        parts = (
            f"epoch {epoch}/{epochs}",
            f"loss {row.get('train_loss', float('nan')):.3f}",
            f"val {' (average '.join(validated)}{')' * (len(validated) - 1)}" if validated else "",
            f"{row['images_per_second']:.{0 if row['images_per_second'] >= 10 else 1}f} images/s",
            f"{row['data_wait_percent']:.0f} % waiting for data",
            f"{row['memory_gb']:.1f} GB",
            f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left",
        )
        say("  ".join(p for p in parts if p))


def memory_in_use() -> float:
    """Largest memory so far in GB: of the GPU if there is one, else of this process; 0 where that is not told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource  # which Windows does not have
    except ModuleNotFoundError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.csv, empty cells left out; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.csv whole, so that a new column (a first validation) finds its place."""
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with written_whole(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def plot_curves(rows: list[dict[str, Any]], picture: Path, shown: Sequence[str] = ()) -> None:
    """Loss, validation and slot entropy over the epochs, from rows of metrics.csv to a PNG.

    `shown` names the figures of validation to draw; if empty, all. Those of averaged weights are dashed.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            epochs, values = curves.setdefault(name, ([], []))
            epochs.append(int(row["epoch"]))
            values.append(float(value))
    figure = Figure(figsize=(12, 3.4), dpi=120, layout="constrained")
    losses, figures, slots = figure.subplots(1, 3)
    losses.set_title("loss")
    figures.set_title("validation")
    slots.set_title("assignment entropy per block (1: idle slots)")
    slots.set_ylim(0, 1.02)
    colours: dict[str, str] = {}
    for name, points in curves.items():
        if name in ("train_loss", "val_loss", "val_ema_loss"):
            losses.plot(*points, marker=".", label=name)
        elif name.startswith("val_"):
            figure_of = name.removeprefix("val_").removeprefix("ema_")
            if not shown or figure_of in shown:
                style = "--" if name.startswith("val_ema_") else "-"
                colour = colours.setdefault(figure_of, f"C{len(colours)}")
                figures.plot(*points, style, marker=".", color=colour, label=name.removeprefix("val_"))
        elif name.endswith("assignment_entropy"):
            slots.plot(*points, marker=".", label=re.sub(r"^(backbone\.)?stages\.", "", name.split("/")[1]))
    for axis in (losses, figures, slots):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7, handlelength=3.5)  # long enough for dashes beside the marker
    with written_whole(picture) as file:
        figure.savefig(file, format="png")


def write_report(folder: Path, shown: Sequence[str] = ()) -> None:
    """`curves.png` and `report.html` of a run: curves, epochs, options and environment in one file that opens anywhere."""
    rows = read_rows(folder / "metrics.csv")
    plot_curves(rows, folder / "curves.png", shown)
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if not c.startswith("slots/")]
    texts = {
        name: (folder / name).read_text("utf-8", "surrogateescape") for name in ("config.yaml", "environment.json")
    }
    about = "Loss, validation accuracy and slot entropy over the epochs; numbers below"
    parts = [image(folder / "curves.png", about), table(columns, ([row.get(c, "") for c in columns] for row in rows))]
    parts += [heading("Options"), listing(texts["config.yaml"])]
    parts += [heading("Environment"), listing(texts["environment.json"])]
    write_page(folder / "report.html", folder.name, parts)
