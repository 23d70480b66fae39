"""`glmix eval`."""

import json as json_module
from base64 import b64decode
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np

from glmix.commands.common import load_for_images, pick_device, print_skipped
from glmix.console import say
from glmix.data.loading import EpochOrder, Prepared, default_workers, make_loader
from glmix.data.samples import DataSet, Skipped, Source, spread
from glmix.errors import UserError
from glmix.models import SHIPPED, backbone_of
from glmix.models.description import Description
from glmix.ranges import Workers
from glmix.tasks import task_named
from glmix.training.evaluate import evaluate, shuffled_slots


def eval(  # noqa: A001  (the command's name)
    data: str,
    checkpoint: str = SHIPPED,
    batch_size: int = 0,
    image_size: int = 0,
    slot_grid: tuple[int, int] | None = None,
    shuffle_slots: bool = False,
    flip: bool = False,
    scales: list[float] | None = None,
    window: int = 0,
    workers: Workers = -1,
    limit: int = 0,
    fast: bool = False,
    json: bool = False,
) -> None:
    """Accuracy of a model on labelled images.

    Args:
        data: as for `glmix train`; the validation split where it has one, or what was held out when this checkpoint was
            trained on it, else all of it.
        checkpoint: run folder, file (ours, a released one, or of `glmix export`) or model name; left out, the weights that
            ship.
        batch_size: images at a time; 0 for that of the run, whose number is then repeated exactly.
        image_size: side of the images; 0 for that of the checkpoint.
        slot_grid: rows and columns of the pooled slots, such as 2 2, to see what fewer or more of them do.
        shuffle_slots: give every pixel another slot's content: what is lost is what the slots carry.
        flip: segmentation: the mean with the mirrored image.
        scales: segmentation: the mean over these sizes, such as [0.5, 1.0, 1.5] times the usual.
        window: segmentation: see the image in overlapping windows of so many pixels, 0 for the whole at once.
        workers: processes that load images; -1 chooses.
        limit: images at most, spread over the data; 0 for all.
        fast: fold the network first (glmix.optimize_for_inference): the same figures, sooner.
        json: print one JSON object instead of a sentence.
    """
    for option, value in (("--batch-size", batch_size), ("--limit", limit)):
        if value < 0:
            raise UserError(
                f"{option} {value}: at least 1, or 0 for {'all' if option == '--limit' else 'that of the run'}"
            )
    model, described = load_for_images(checkpoint, image_size, fast)
    task = task_named(described.task)
    try:
        if slot_grid is not None:
            backbone_of(model).set_slot_grid(slot_grid)
        elif shuffle_slots:
            backbone_of(model)
    except ValueError as error:
        raise UserError(f"{'--slot-grid' if slot_grid else '--shuffle-slots'}: {error}") from error
    seen: Any = model
    if flip or scales or window:
        if task.views is None:
            raise UserError(f"--flip, --scales and --window are of segmentation; {checkpoint} is for {task.name}")
        try:
            seen = task.views(model, flip, scales or [1.0], window)
        except ValueError as error:
            raise UserError(str(error)) from error
    with shuffled_slots(model) if shuffle_slots else nullcontext():
        metrics = task.metrics(described)
        scores, used, skipped = measured(seen, described, metrics, data, batch_size, workers, limit)
    if not used:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    details = metrics.details() if hasattr(metrics, "details") else {}
    if json:
        about = {"images": used, "skipped": [found._asdict() for found in skipped]}
        print(json_module.dumps(scores | details | about))
        return
    print(f"{task.describe(scores)} on {used} images")
    print_details(details)
    print_skipped(skipped)


def measured(
    model: Any, described: Description, metrics: Any, data: str, batch_size: int = 0, workers: int = -1, limit: int = 0
) -> tuple[dict[str, float], int, list[Skipped]]:
    """Figures of a model on `data`, the number of images they are of, and those that could not be used."""
    task = task_named(described.task)
    source = task.align(held_out(task.open(data), described), described, data)
    order = EpochOrder(min(limit or len(source), len(source)), batch_size or described.info.get("batch_size", 64))
    if limit:
        source = source.take(spread(len(source), limit))
    prepared = Prepared(source, task.evaluation(described.prepared))
    loader = make_loader(prepared, order, default_workers() if workers < 0 else workers, task.collate)
    return evaluate(task, model, loader, metrics, pick_device())


def print_details(details: dict[str, Any]) -> None:
    """A line for each class, and the images that went worst."""
    classes = details.get("classes", {})
    if classes:
        columns = list(next(iter(classes.values())))
        width = max(map(len, classes)) + 2
        print(" " * width + "".join(f"{column:>12}" for column in columns))
        for name, row in classes.items():
            print(f"{name:<{width}}" + "".join(f"{row[column]:>12.3f}" for column in columns))
    for row in details.get("worst", []):
        print("worst: " + ", ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))


def held_out(data: DataSet, described: Description) -> Source:
    """What to evaluate on: of the data that this checkpoint was trained on, what was held out then; else as data has it.

    Files that were added since are left out: nothing tells whether they would have been trained on.
    """
    kept = described.info.get("held_out")
    if kept and data.made:
        found = data.held_out({int(print_) for print_ in np.frombuffer(b64decode(kept), np.uint64)})
        if found is not None:
            new = len(data.whole) - described.info.get("images", len(data.whole))
            say(
                f"the {len(found)} images that were held out in training"
                + (f"; {new} are new since, and left out" if new > 0 else "")
            )
            return found
    if kept is None and data.made and "validation_images" in described.info:  # a run of before they were kept
        with suppress(UserError):
            found = data.split("val")
            if found.digest() == described.info["validation_images"]:
                return found
    return data.evaluation()
