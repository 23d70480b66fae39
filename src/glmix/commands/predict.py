"""`glmix predict`."""

import json as json_module
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any

import torch

from glmix.commands.common import load_for_images, pick_device
from glmix.data.images import BadImage, read_image
from glmix.data.samples import Sample
from glmix.errors import UserError
from glmix.files import plain_name, written_whole
from glmix.models import SHIPPED
from glmix.ranges import Share
from glmix.slots.folder import LONGEST_NAME
from glmix.tasks import task_named


@torch.inference_mode()
def predict(
    images: list[str],
    checkpoint: str = SHIPPED,
    top: int = 0,
    image_size: int = 0,
    json: bool = False,
    out: str = "",
    least_score: Share = 0.4,
) -> None:
    """What a model sees in images.

    Args:
        images: image files.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        top: answers per image at most; 0 for three classes, or all objects.
        image_size: side of the images; 0 for that of the checkpoint.
        json: print one JSON object per image instead of sentences.
        out: folder for pictures of what was found, and predictions.json: of detectors in COCO's form, with the data's ids.
        least_score: of the objects that are drawn.
    """
    if top < 0:
        raise UserError(f"--top {top}: at least one, or 0 for the usual")
    model, described = load_for_images(checkpoint, image_size)
    task = task_named(described.task)
    if out and task.draw is None:
        raise UserError(f"--out: there are no pictures of what a model for {task.name} sees; leave it out")
    rows: list[dict[str, Any]] = []
    transform = task.evaluation(described.prepared)
    used = 0
    for path in images:
        try:
            if Path(path).is_dir():
                raise BadImage(path, "a folder, not an image")
            picture = read_image(path)
        except BadImage as error:
            row: dict[str, Any] = {"image": error.name, "error": error.reason}
            print(json_module.dumps(row) if json else f"skipped {error}", flush=True)
            continue
        batch = task.collate([(transform(Sample(picture, None, path)), [])]).to(pick_device())
        (answers,) = task.decode(task.forward(model, batch), batch, described, top or task.usual_top)
        used += 1
        row = {"image": path, "predictions": answers}
        if out and task.draw is not None:
            name = unlike(plain_name(Path(path).stem, LONGEST_NAME), {row["picture"] for row in rows})
            with written_whole(Path(out) / f"{name}.png") as file:
                task.draw(picture, answers, least_score).save(file, "PNG")
            rows.append(row | {"size": picture.info["full_size"][::-1], "picture": name})
        print(json_module.dumps(row) if json else f"{path}: {task.tell(answers)}", flush=True)
    if not used:
        raise UserError("none of the images could be read")
    if out and task.collect is not None:
        with written_whole(Path(out) / "predictions.json", "w", encoding="utf-8") as file:
            json_module.dump(task.collect(rows, described), file)


def unlike(name: str, others: Collection[str]) -> str:
    """A name that is none of `others`: photos of one name can come from several folders."""
    numbered = (f"{name}-{number}" for number in count(2))
    return name if name not in others else next(each for each in numbered if each not in others)
