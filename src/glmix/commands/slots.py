"""`glmix slots`."""

import json as json_module
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from glmix.commands.common import (
    check_counts,
    check_not_empty,
    load_for_slots,
    pick_device,
    print_skipped,
    set_grid,
    set_slots,
)
from glmix.commands.eval import batches_of, classifying, held_out, refuse_given
from glmix.console import progress
from glmix.data.samples import Skipped, spread
from glmix.data.voc import open_masks
from glmix.errors import UserError
from glmix.models import SHIPPED, GLNet, create_model
from glmix.models.description import Description
from glmix.ranges import Workers
from glmix.slots.ablation import ablate as ablate_rows
from glmix.slots.ablation import plot_ablation
from glmix.slots.adaptive import THRESHOLDS, Fullness, Trade, fullness, plot_trade_off, trade_off
from glmix.slots.figures import figure_path, save_figure
from glmix.slots.quality import MEASURES, plot_quality, slot_quality
from glmix.tasks import task_named


def slots(
    data: str,
    checkpoint: str = SHIPPED,
    random_weights: bool = False,
    image_size: int = 0,
    slot_grid: tuple[int, int] | None = None,
    slots: str = "",
    limit: int = 0,
    ablate: bool = False,
    adaptive: bool = False,
    thresholds: list[float] | None = None,
    batch_size: int = 0,
    workers: Workers = -1,
    figure: str = "",
    json: bool = False,
) -> None:
    """How well the slots match masks of objects: best-match IoU, boundary recall and purity of every block's slots.

    Beside them stand the same of square patches and of SLIC superpixels, as many as there are slots. With --ablate
    instead, what the slots are worth to a classifier; with --adaptive, what it is worth that images have their own number.

    Args:
        data: a folder in PASCAL VOC's layout (the split val), or 'scenes'; with --ablate labelled images, as for `glmix eval`.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        random_weights: the model as it is before training, for comparison.
        image_size: shorter side at which the network sees an image; 0 for that of the checkpoint.
        slot_grid: rows and columns of the pooled slots, such as [2, 2], to see what fewer or more of them do.
        slots: how many slots an image has: auto, a number or a threshold, as for `glmix eval`.
        limit: images at most, spread evenly over the data; 0 for all.
        ablate: instead, the accuracy that is lost when global and local branches are switched off, when slots get other
            contents, and when pixels are assigned by other rules; of the same images, with standard errors.
        adaptive: instead, accuracy and time where each image's alike slots are merged, beside fixed numbers of the same mean
            (of labelled images whose classes the checkpoint has), and whether images of more objects keep more slots (of
            data with masks).
        thresholds: with --adaptive, cosines from which slots are merged, such as [0.95, 0.9].
        batch_size: with --ablate and --adaptive, images at a time; 0 for that of the run.
        workers: with --ablate and --adaptive, processes that load images; -1 chooses.
        figure: file for a picture of the measures over depth, such as quality.png.
        json: print one JSON object instead of a table.
    """
    check_counts(limit, batch_size)
    if ablate and adaptive:
        raise UserError("--ablate, --adaptive: one of both at a time")
    refuse_given({"--slots": slots and (ablate or adaptive)}, f"--{'ablate' if ablate else 'adaptive'}")
    refuse_given({"--random-weights": random_weights and adaptive}, "--adaptive, which is of trained slots")
    if thresholds is not None and not adaptive:
        raise UserError("--thresholds: with --adaptive alone; leave it out")
    check_not_empty("--thresholds", thresholds)
    for threshold in thresholds or []:
        if not 0 <= threshold <= 1:
            raise UserError(f"--thresholds {threshold:g}: a threshold is between 0 and 1")
    if not (ablate or adaptive):
        refuse_given({"--batch-size": batch_size, "--workers": workers != -1}, "measures of masks, image by image")
    model, described = load_for_slots(checkpoint, image_size)
    preparation = described.prepared  # which `load` always fills in
    if random_weights:
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"in_chans": preparation.channels} | described.model_args
        model = create_model(described.model, num_classes=model.num_classes, **arguments).eval()
        model.to(pick_device())
    if slot_grid is not None:
        set_grid(model, slot_grid, described)
    set_slots(model, slots)
    file = figure_path(figure) if figure else None  # before the work, which a mistake here would lose
    if ablate:
        ablated(model, described, data, checkpoint, limit, batch_size, workers, file, json)
        return
    if adaptive:
        adapted(model, described, data, checkpoint, thresholds or THRESHOLDS, limit, batch_size, workers, file, json)
        return
    images = open_masks(data)
    images = images.take(spread(len(images), limit))
    scores, used, skipped = slot_quality(model, images, preparation, progress)
    if not used:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    if json:
        print(json_module.dumps({"images": used, "skipped": [s._asdict() for s in skipped], "measures": scores}))
    else:
        print(f"{used} images; a region is where a slot is the strongest")
        print(table(scores))
        print_skipped(skipped)
    if file:
        weights = "random weights" if random_weights else f"weights of {checkpoint}"
        save_figure(plot_quality(scores, f"{described.model}, {weights}; {used} images of {Path(data).name}"), file)


def ablated(
    model: GLNet, described: Description, data: str, checkpoint: str, limit: int, batch_size: int, workers: int,
    file: Path | None, json: bool,
) -> None:  # fmt: skip
    """What the parts of a classifier are worth to it, told and drawn."""
    task = classifying(task_named(described.task), "--ablate")
    source = task.align(held_out(task.open(data), described), described, data)
    source = source.take(spread(len(source), limit))
    loader = batches_of(task, described, source, batch_size, workers)
    top1, costs, used, skipped = ablate_rows(model.eval(), model, loader, lambda done: progress(done, len(source)))
    if not used:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    if json:
        rows = [asdict(cost) for cost in costs]
        print(
            json_module.dumps({"images": used, "skipped": [s._asdict() for s in skipped], "top1": top1, "rows": rows})
        )
    else:
        print(f"top-1 {top1:.2f} % on {used} images; without or with others of its parts:")
        print(f"{'':<30}{'top-1, %':>10}{'points':>9}{'error':>7}{'lost':>7}{'gained':>8}")
        for cost in costs:
            print(
                f"{cost.row:<30}{cost.top1:>10.2f}{cost.difference:>+9.2f}{cost.error:>7.2f}{cost.lost:>7}{cost.gained:>8}"
            )
        print_skipped(skipped)
    if file:
        about = f"{described.model}, weights of {checkpoint}; top-1 {top1:.2f} % on {used} images of {Path(data).name}"
        save_figure(plot_ablation(costs, about), file)


def adapted(
    model: GLNet, described: Description, data: str, checkpoint: str, thresholds: Sequence[float], limit: int,
    batch_size: int, workers: int, file: Path | None, json: bool,
) -> None:  # fmt: skip
    """What slots that adapt are worth, of data with labels, and whom they are given to, of data with masks."""
    try:  # before the work
        model.set_slot_merging(1.0)
        model.set_slot_merging()
    except ValueError as error:
        raise UserError(f"--adaptive: {error}") from error
    found: dict[str, Any] = {}
    told: list[str] = []
    skipped: list[Skipped] = []
    labelled, masked, reason = None, None, ""
    task = task_named(described.task)
    with suppress(UserError):
        masked = open_masks(data)
    try:
        labelled = classifying(task, "--adaptive").align(held_out(task.open(data), described), described, data)
    except UserError as error:
        reason = str(error)
    if file and labelled is None:
        raise UserError(f"--figure: with --adaptive, of accuracy, for which there are no labels: {reason}")
    if masked is None and labelled is None:
        raise UserError(f"--adaptive: neither masks of objects, nor labels that this checkpoint knows: {reason}")
    if labelled is not None:
        labelled = labelled.take(spread(len(labelled), limit))
        loader = batches_of(task, described, labelled, batch_size, workers)
        count = 2 * len(labelled)
        rows, used, left = trade_off(model.eval(), model, loader, thresholds, lambda done: progress(done, count))
        if not used:
            raise UserError(f"{data}: none of {len(left)} images can be read (first: {left[0]})")
        skipped += left
        found |= {"images": used, "rows": [defined(asdict(row)) for row in rows]}
        told += [f"{used} images; a threshold is beside fixed numbers of its mean:", *trade_table(rows)]
        if file:
            about = f"{described.model}, weights of {checkpoint}; {used} images of {Path(data).name}"
            save_figure(plot_trade_off(rows, about), file)
    if masked is not None:
        masked = masked.take(spread(len(masked), limit))
        full, objects, left = fullness(model.eval(), masked, described.prepared, thresholds, progress)
        if not full:
            raise UserError(f"{data}: none of {len(left)} images can be read (first: {left[0]})")
        skipped += left
        about_objects = {"images": len(objects), "mean": float(objects.mean()), "most": int(objects.max())}
        found |= {"objects": about_objects, "fullness": [defined(asdict(row)) for row in full]}
        told += [
            f"{len(objects)} images of {objects.mean():.1f} objects, {objects.max()} at most; rank correlation of objects "
            f"and slots, mean over blocks and of the first ({chance_of(len(objects))}):",
            *(
                f"threshold {row.threshold:<8g}{row.slots:>7.1f} ± {row.spread:<6.1f} slots"
                + "".join(f"{value:>+9.2f}" if value == value else f"{'-':>9}" for value in correlations(row))
                for row in full
            ),
        ]
    if json:
        print(json_module.dumps(found | {"skipped": [one._asdict() for one in skipped]}))
        return
    print(*told, sep="\n")
    print_skipped(skipped)


def chance_of(images: int) -> str:
    """How far correlations of so many images spread where there is none."""
    return f"± {1 / (images - 1) ** 0.5:.2f} where there is none" if images > 2 else "too few images to have one"


def correlations(row: Fullness) -> tuple[float, float]:
    """Of the mean over blocks, and of the first block."""
    return row.correlation, next(iter(row.blocks.values()))


def trade_table(rows: Sequence[Trade]) -> list[str]:
    """Rows of `trade_off`; fixed numbers stand under the threshold that they are the mean of."""
    header = ("slots", "±", "top-1, %", "points", "error", "ahead", "error", "ms")
    lines = [f"{'':<18}" + "".join(f"{name:>9}" for name in header)]
    for row in rows:
        ahead = f"{row.ahead:>+9.2f}{row.ahead_error:>9.2f}" if row.ahead == row.ahead else " " * 18
        name = f"  {row.setting}" if row.kind in ("budget", "grid") else row.setting
        lines.append(
            f"{name:<18}{row.slots:>9.1f}{row.spread:>9.1f}{row.top1:>9.2f}{row.difference:>+9.2f}{row.error:>9.2f}"
            f"{ahead}{row.ms:>9.2f}"
        )
    return lines


def defined(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: without what is not defined."""
    return {key: defined(value) if isinstance(value, dict) else value for key, value in row.items() if value == value}


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Rows of measures."""
    columns = {"entropy": "entropy"} | MEASURES | {"regions": "regions", "boundary": "boundary pixels"}
    lines = [f"{'':<18}" + "".join(f"{label:>17}" for label in columns.values())]
    for name, row in scores.items():
        cells = [f"{row[key]:.1f}" if key == "regions" else f"{row[key]:.3f}" if key in row else "" for key in columns]
        lines.append(f"{name:<18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
