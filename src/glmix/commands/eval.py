"""`glmix eval`."""

from base64 import b64decode
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from glmix.commands.common import (
    check_counts,
    check_not_empty,
    load_for_images,
    pick_device,
    print_skipped,
    set_grid,
    set_slots,
)
from glmix.commands.weak_segment import weak_segment
from glmix.console import as_json, say
from glmix.data.loading import EpochOrder, Prepared, default_workers, make_loader
from glmix.data.samples import DataSet, Skipped, Source, spread
from glmix.data.sources import open_data
from glmix.errors import UserError, needs
from glmix.export.files import Exported
from glmix.files import check_folder
from glmix.models import SHIPPED, backbone_of, network_of
from glmix.models.description import Description
from glmix.models.glnet import NO_SLOTS
from glmix.models.merging import counted_slots
from glmix.ranges import Workers
from glmix.slots.class_maps import MapKind
from glmix.tasks import TASKS, task_named
from glmix.training.evaluate import evaluate, shuffled_slots
from glmix.training.processes import Processes, gathered, join_processes
from glmix.training.task import Task
from glmix.use.features import embedding
from glmix.use.probes import NEIGHBOURS, labelled_features, nearest
from glmix.use.probes import linear as linear_probe
from glmix.use.reports import Answers, difference, recording, write_comparison, write_report


def eval(  # noqa: A001  (the command's name)
    data: str,
    checkpoint: str = SHIPPED,
    batch_size: int = 0,
    image_size: int = 0,
    slot_grid: tuple[int, int] | None = None,
    slots: str = "",
    shuffle_slots: bool = False,
    flip: bool = False,
    scales: list[float] | None = None,
    window: int = 0,
    workers: Workers = -1,
    limit: int = 0,
    fast: bool = False,
    report: str = "",
    compare: tuple[str, str] | None = None,
    knn: bool = False,
    linear: bool = False,
    task: Literal["weak-segment"] | None = None,
    maps: MapKind | None = None,
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
        slots: how many slots an image has: auto, a number to which alike ones are merged, or a threshold with a point, such as
            0.9, the cosine from which they are (then each image has its own number); left out, all of the grid.
        shuffle_slots: give every pixel another slot's content: what is lost is what the slots carry.
        flip: segmentation: the mean with the mirrored image.
        scales: segmentation, and weak-segment: the mean over these sizes, such as [0.5, 1.0, 1.5] times the usual.
        window: segmentation: see the image in overlapping windows of so many pixels, 0 for the whole at once.
        workers: processes that load images; -1 chooses.
        limit: images at most, spread over the data; 0 for all.
        fast: fold the network first (glmix.optimize_for_inference): the same figures, sooner.
        report: folder for a page of figures to act on: classes, confusions, the surest mistakes, calibration.
        compare: two checkpoints, instead of --checkpoint: their difference on the same images, with its interval.
        knn: instead, how well the nearest training images by frozen features tell the classes of the validation images.
        linear: instead, how well a linear classifier of frozen features does.
        task: weak-segment, for how good the masks are that a classifier gives where only image labels are known; --data
            is then a folder of images and masks, such as PASCAL VOC's, or 'scenes'.
        maps: weak-segment: where the evidence for a class is taken from: gradient (times the features; if left out), grad-cam
            or cam.
        json: print one JSON object instead of a sentence.
    """
    check_counts(limit, batch_size)
    check_folder("--report", report)
    check_not_empty("--scales", scales)
    if task == "weak-segment":
        others = {"--batch-size": batch_size, "--slots": slots, "--shuffle-slots": shuffle_slots, "--flip": flip,
                  "--window": window, "--workers": workers != -1, "--fast": fast, "--compare": compare, "--knn": knn,
                  "--linear": linear}  # fmt: skip
        refuse_given(others, "--task weak-segment")
        weak_segment(data, checkpoint, image_size, slot_grid, maps or "gradient", scales, limit, report, json)
        return
    if maps:
        raise UserError("--maps: of --task weak-segment alone; leave it out")
    of_answers = {"--slot-grid": slot_grid, "--slots": slots, "--shuffle-slots": shuffle_slots, "--flip": flip, "--scales": scales,
                  "--window": window, "--fast": fast}  # fmt: skip
    if knn or linear:
        refuse_given(of_answers | {"--report": report, "--compare": compare}, "--knn and --linear, of frozen features")
    elif compare:
        refuse_given(of_answers | {"--checkpoint": checkpoint != SHIPPED}, "--compare, of two checkpoints as they are")
    elif slots:
        refuse_given({"--shuffle-slots": shuffle_slots}, "--slots, which leaves an image fewer to exchange")
    processes = join_processes()
    loading = default_workers() if workers < 0 else workers
    if knn or linear:
        probe(data, checkpoint, image_size, batch_size, loading, limit, [knn, linear], processes, json)
        return
    if compare:
        compared(data, compare, image_size, batch_size, loading, limit, report, processes, json)
        return
    model, described = load_for_images(checkpoint, image_size, fast)
    own = task_named(described.task)
    if isinstance(model, Exported) and (slot_grid or slots or shuffle_slots):
        raise UserError(
            f"{checkpoint}: an exported file keeps the slots it was made with; name the checkpoint for these options"
        )
    if slot_grid is not None:
        set_grid(model, slot_grid, described)
    set_slots(model, slots)
    if shuffle_slots:
        try:
            there = backbone_of(model).slot_mixers()
        except ValueError as error:
            raise UserError(f"--shuffle-slots: {error}") from error
        if not there:
            raise UserError(f"--shuffle-slots: {NO_SLOTS}")
    seen: Any = model
    if flip or scales or window:
        if own.views is None:
            raise UserError(f"--flip, --scales and --window are of segmentation; {checkpoint} is for {own.name}")
        try:
            seen = own.views(model, flip, scales or [1.0], window)
        except ValueError as error:
            raise UserError(str(error)) from error
    source = own.align(held_out(opened(own, data, checkpoint), described), described, data)
    if limit:
        source = source.take(spread(len(source), limit))
    answers = Answers()
    asked = recording(classifying(own, "--report"), answers) if report else own
    with shuffled_slots(model) if shuffle_slots else nullcontext(), counted_slots(model) as counts:
        metrics = own.metrics(described)
        scores, used, skipped = measured(asked, seen, described, metrics, source, batch_size, loading, processes)
    if not used:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    answers = answers.everywhere() if report else answers
    numbers = [float(count) for batches in counts.values() for batch in batches for count in batch]
    kept = [count for part in gathered(numbers) for count in part]
    if not processes.first:
        return
    if report:
        write_report(Path(report), answers, scores, source, described, f"{checkpoint} on {data}")
    details = metrics.details() if hasattr(metrics, "details") else {}
    if json:
        about = {"images": used, "skipped": [found._asdict() for found in skipped]}
        about |= {"slots": float(np.mean(kept))} if kept else {}
        print(as_json(scores | details | about))
        return
    print(f"{own.describe(scores)} on {used} images" + (f", {np.mean(kept):.1f} slots an image" if kept else ""))
    print_details(details)
    print_skipped(skipped)
    if report:
        print(Path(report) / "report.html")


def measured(
    task: Task, model: Any, described: Description, metrics: Any, source: Source, batch_size: int, workers: int,
    processes: Processes,
) -> tuple[dict[str, float], int, list[Skipped]]:  # fmt: skip
    """As `evaluate`, of all images of a source."""
    loader = batches_of(task, described, source, batch_size, workers, processes)
    return evaluate(task, model, loader, metrics, pick_device())


def batches_of(
    task: Task,
    described: Description,
    source: Source,
    batch_size: int,
    workers: int,
    processes: Processes | None = None,
) -> Any:
    """Batches of a source as the run of `described` validated it, in as large ones if `batch_size` is 0; a process's share."""
    size = batch_size or described.info.get("batch_size", 64)
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    order = EpochOrder(len(source), size, rank=rank, processes=count)
    loading = default_workers() if workers < 0 else workers
    return make_loader(Prepared(source, task.evaluation(described.prepared)), order, loading, task.collate)


def refuse_given(options: dict[str, Any], beside: str) -> None:
    """Raise a UserError if any of these was given, which would change nothing."""
    if given := [option for option, value in options.items() if value]:
        raise UserError(f"{given[0]}: of no use with {beside}; leave it out")


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
        image, *figures = row.items()
        told = (f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures)
        print(f"worst: {image[1]}: {', '.join(told)}")


def classifying(task: Task, option: str) -> Task:
    """The task, if it is one of one label an image.

    Raises:
        UserError: it is another.
    """
    if task.decode is not TASKS["classify"].decode:
        raise UserError(f"{option}: of classifiers; this checkpoint's task is {task.name}")
    return task


def compared(
    data: str, checkpoints: tuple[str, str], image_size: int, batch_size: int, workers: int, limit: int, report: str,
    processes: Processes, json: bool,
) -> None:  # fmt: skip
    """Two checkpoints on the images that were held out of the first's training."""
    loaded = [load_for_images(one, image_size) for one in checkpoints]
    (_, first), (_, second) = loaded
    if set(first.classes) != set(second.classes):
        only = sorted(set(first.classes) ^ set(second.classes))
        raise UserError(
            f"{' and '.join(checkpoints)}: of other classes (first in one alone: {only[0]}); compare what answers the same question"
        )
    source = held_out(task_named(first.task).open(data), first)
    source = source.take(spread(len(source), limit)) if limit else source
    source = classifying(task_named(first.task), "--compare").align(source, first, data)
    both: list[Answers] = []
    for model, described in loaded:
        answers = Answers()
        task = classifying(task_named(described.task), "--compare")
        aligned = task.align(source, described, data)
        metrics = task.metrics(described)
        measured(recording(task, answers), model, described, metrics, aligned, batch_size, workers, processes)
        answers = answers.everywhere()
        places = np.array([first.classes.index(name) for name in described.classes])
        answers.given, answers.seen = places[answers.given], places[answers.seen]
        both.append(answers)
    if not processes.first:
        return
    if not both[0].names:
        raise UserError(f"{data}: none of {len(source)} images can be read")
    found = difference(both[0].right, both[1].right)
    if report:
        write_comparison(Path(report), found, (both[0], both[1]), source, first.names, checkpoints)
    print(as_json(asdict(found)) if json else found)
    if report and not json:
        print(Path(report) / "comparison.html")


def probe(
    data: str, checkpoint: str, image_size: int, batch_size: int, workers: int, limit: int, asked: list[bool],
    processes: Processes, json: bool,
) -> None:  # fmt: skip
    """Frozen features of the training images, and what they tell of the validation images."""
    with needs("evaluate"):
        import sklearn  # noqa: F401  (before the work)
    model, described = load_for_images(checkpoint, image_size)
    opened, net, found = open_data(data), network_of(model), {}
    for split in ("train", "val"):
        source = opened.split(split)
        source = source.take(spread(len(source), limit)) if limit else source
        stream = embedding(net, described.prepared, "head", source, pick_device(), batch_size, workers)
        found[split] = labelled_features(stream, source, processes)
    if not processes.first:
        return
    neighbours = min(NEIGHBOURS, len(found["train"].targets))
    kinds = {"knn": (f"k-NN of {neighbours}", nearest), "linear": ("linear", linear_probe)}
    scores = {
        name: measure(found["train"], found["val"])
        for (name, (_, measure)), wanted in zip(kinds.items(), asked, strict=True)
        if wanted
    }
    counts = {split: len(part.targets) for split, part in found.items()}
    if json:
        print(as_json(scores | {"images": counts["val"], "training_images": counts["train"]}))
        return
    told = ", ".join(f"{kinds[name][0]} top-1 {value:.2f} %" for name, value in scores.items())
    print(f"{told} on {counts['val']} images, by frozen features of {counts['train']}")
    print_skipped([one for part in found.values() for one in part.skipped])


def opened(task: Task, data: str, checkpoint: str) -> DataSet:
    """The data, for a checkpoint of this task.

    Raises:
        UserError: it is none of that task's; names the checkpoint too, which may be of another one than was meant.
    """
    try:
        return task.open(data)
    except UserError as error:
        raise UserError(f"{error} ({checkpoint} is for {task.name})") from error


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
