"""`glmix eval`."""

import json as json_module
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from glmix.commands.common import default_workers, load_for_images, pick_device
from glmix.data.loading import EpochOrder, Images, Prepared, make_loader
from glmix.data.masks import open_masks
from glmix.data.sources import open_evaluation, open_split
from glmix.data.token_labels import digest_of
from glmix.errors import UserError
from glmix.models import SHIPPED, GLNet, create_model
from glmix.models.weights import Checkpoint
from glmix.tasks.evaluation import evaluate, shuffled_slots
from glmix.tasks.slot_quality import MEASURES, plot_quality, slot_quality


def eval(  # noqa: A001  (the command's name)
    data: str,
    checkpoint: str = SHIPPED,
    batch_size: int = 0,
    image_size: int = 0,
    slot_grid: tuple[int, int] | None = None,
    shuffle_slots: bool = False,
    workers: int = -1,
    task: str = "classify",
    random_weights: bool = False,
    limit: int = 0,
    figure: str = "",
    json: bool = False,
) -> None:
    """Accuracy of a model on labelled images; or, with --task slots, how well its slots match masks of objects.

    Args:
        data: as for `glmix train`; the validation split where it has one, or what was held out when this checkpoint was
            trained on it, else all of it. For slots: a folder in PASCAL VOC's layout (the split val), or 'scenes'.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        batch_size: images at a time; 0 for that of the run, whose number is then repeated exactly.
        image_size: side of the images; 0 for that of the checkpoint.
        slot_grid: rows and columns of the pooled slots, such as [2, 2], to see what fewer or more of them do.
        shuffle_slots: give every pixel another slot's content: what is lost is what the slots carry.
        workers: processes that load images; -1 chooses.
        task: classify, or slots: best-match IoU, boundary recall and purity of each block's slots, beside square
            patches and SLIC superpixels.
        random_weights: the model as it is before training, for comparison.
        limit: images at most; 0 for all.
        figure: file for a picture of the slots' measures over depth, such as quality.png.
        json: print one JSON object instead of a sentence.
    """
    if task not in ("classify", "slots"):
        raise UserError(f"--task {task}: classify or slots")
    if batch_size < 0:
        raise UserError(f"--batch-size {batch_size}: at least 1, or 0 for that of the run")
    if limit < 0:
        raise UserError(f"--limit {limit}: at least 1, or 0 for all")
    if shuffle_slots and task == "slots":
        raise UserError("--shuffle-slots: changes what slots hold, not where they are; leave it out with --task slots")
    model, described, transform = load_for_images(checkpoint, image_size)
    if random_weights:
        torch.manual_seed(0)
        model = create_model(described.model, num_classes=model.num_classes, **described.model_args).eval()
        model.to(pick_device())
    try:
        if slot_grid is not None:
            model.set_slot_grid(slot_grid)
    except ValueError as error:
        raise UserError(f"--slot-grid: {error}") from error
    if task == "slots":
        about = f"{described.model}, {'random weights' if random_weights else f'weights of {checkpoint}'}"
        eval_slots(model, described, data, limit, figure, about, json)
        return
    if figure:
        raise UserError("--figure: only with --task slots")
    images = held_out(data, described) or open_evaluation(data)
    match_labels(images, described.classes, data)
    dataset = Prepared(images, transform)
    loader = make_loader(
        dataset,
        EpochOrder(min(limit or len(dataset), len(dataset)), shuffle=False),
        batch_size or described.info.get("batch_size", 64),
        default_workers() if workers < 0 else workers,
    )
    with shuffled_slots(model) if shuffle_slots else nullcontext():
        scores, skipped = evaluate(model, loader, len(described.classes), pick_device())
    if not scores["images"]:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    if json:
        print(json_module.dumps(scores | {"skipped": skipped}))
        return
    accuracy = f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, loss {scores['loss']:.4f}"
    print(f"{accuracy} on {scores['images']} images")
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")


def held_out(data: str, described: Checkpoint) -> Images | None:
    """The part of `data` that was held out in the training of this checkpoint, if it is the data of that training."""
    digest = described.info.get("validation_images")
    if not digest:
        return None
    try:
        images = open_split(data, "val")
    except UserError:  # a folder of the validation images alone, say
        return None
    if digest_of(images) != digest:
        return None
    return images


def match_labels(images: Images, classes: list[str], data: str) -> None:
    """Relabel `images` to the model's class indices, by class name.

    Raises:
        UserError: a class folder is none of the model's classes.
    """
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in images.classes if name not in index]
    if unknown:
        raise UserError(
            f"{data}: {len(unknown)} of {len(images.classes)} classes are not among the model's {len(classes)} classes "
            f"(first: {unknown[0]}; the model's first: {classes[0]}); use a model trained on these classes"
        )
    images.labels[:] = [index[images.classes[label]] for label in images.labels]


def eval_slots(model: GLNet, described: Checkpoint, data: str, limit: int, figure: str, about: str, json: bool) -> None:
    """Print the measures of the slots of every block, and of what they are compared with."""
    if not model.slot_mixers():
        raise UserError("this model has no GLMix blocks, so no slots to measure")
    images = open_masks(data)
    if figure:  # before the work, whose figures would be lost
        try:
            Path(figure).parent.mkdir(parents=True, exist_ok=True)
            Figure(figsize=(1, 1)).savefig(figure)
        except ValueError as error:
            raise UserError(f"--figure {figure}: {error}") from error

    def progress(done: int, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{count}", end="" if done < count else "\n", file=sys.stderr, flush=True)

    scores, used, skipped = slot_quality(model, images, described.image, limit, progress)
    if not used:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    if figure:
        plot_quality(scores, f"{about}; {used} images of {Path(data).name}").savefig(figure)
    if json:
        print(json_module.dumps({"images": used, "skipped": skipped, "measures": scores}))
        return
    print(f"{used} images; a region is where a slot is the strongest")
    print(table(scores))
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Rows of measures."""
    columns = {"entropy": "entropy"} | MEASURES | {"regions": "regions", "boundary": "boundary pixels"}
    lines = [f"{'':<18}" + "".join(f"{label:>17}" for label in columns.values())]
    for name, row in scores.items():
        cells = [f"{row[key]:.1f}" if key == "regions" else f"{row[key]:.3f}" if key in row else "" for key in columns]
        lines.append(f"{name:<18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
