"""`glmix eval`."""

import json as json_module
from contextlib import nullcontext

from glmix.commands.common import default_workers, load_for_images, pick_device
from glmix.data.loading import EpochOrder, Images, Prepared, make_loader
from glmix.data.sources import open_evaluation
from glmix.errors import UserError
from glmix.models import SHIPPED
from glmix.tasks.evaluation import evaluate, shuffled_slots


def eval(  # noqa: A001  (the command's name)
    data: str,
    checkpoint: str = SHIPPED,
    batch_size: int = 0,
    image_size: int = 0,
    slot_grid: tuple[int, int] | None = None,
    shuffle_slots: bool = False,
    workers: int = -1,
    json: bool = False,
) -> None:
    """Accuracy of a model on labelled images.

    Args:
        data: as for `glmix train`; the validation split where it has one, else all of it.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        batch_size: images at a time; 0 for that of the run, whose number is then repeated exactly.
        image_size: side of the images; 0 for that of the checkpoint.
        slot_grid: rows and columns of the pooled slots, such as [2, 2], to see what fewer or more of them do.
        shuffle_slots: give every pixel another slot's content: what is lost is what the slots carry.
        workers: processes that load images; -1 chooses.
        json: print one JSON object instead of a sentence.
    """
    model, described, transform = load_for_images(checkpoint, image_size)
    images = open_evaluation(data)
    match_labels(images, described.classes, data)
    try:
        if slot_grid is not None:
            model.set_slot_grid(slot_grid)
    except ValueError as error:
        raise UserError(f"--slot-grid: {error}") from error
    dataset = Prepared(images, transform)
    loader = make_loader(
        dataset,
        EpochOrder(len(dataset), shuffle=False),
        batch_size or described.info.get("batch_size", 64),
        default_workers() if workers < 0 else workers,
    )
    with shuffled_slots(model) if shuffle_slots else nullcontext():
        scores, skipped = evaluate(model, loader, len(described.classes), pick_device())
    if json:
        print(json_module.dumps(scores | {"skipped": skipped}))
        return
    accuracy = f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %, loss {scores['loss']:.4f}"
    print(f"{accuracy} on {scores['images']} images")
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")


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
