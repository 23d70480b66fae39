"""`glmix predict`."""

import json as json_module
from pathlib import Path
from typing import Any

import torch

from glmix.commands.common import load_for_images, pick_device
from glmix.data.images import BadImage, read_image
from glmix.data.samples import Sample
from glmix.errors import UserError
from glmix.models import SHIPPED
from glmix.tasks import task_named


@torch.inference_mode()
def predict(
    images: list[str],
    checkpoint: str = SHIPPED,
    top: int = 3,
    image_size: int = 0,
    fast: bool = False,
    json: bool = False,
) -> None:
    """What a model sees in images.

    Args:
        images: image files.
        checkpoint: run folder, file (ours, a released one, or of `glmix export`) or model name; left out, the weights that
            ship.
        top: classes to name per image.
        image_size: side of the images; 0 for that of the checkpoint.
        fast: fold the network first (glmix.optimize_for_inference): worth it for many images.
        json: print one JSON object per image instead of sentences.
    """
    if top < 1:
        raise UserError(f"--top {top}: at least one")
    model, described = load_for_images(checkpoint, image_size, fast)
    task = task_named(described.task)
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
        (answers,) = task.decode(task.forward(model, batch), batch, described, top)
        used += 1
        row = {"image": path, "predictions": answers}
        print(json_module.dumps(row) if json else f"{path}: {task.tell(answers)}", flush=True)
    if not used:
        raise UserError("none of the images could be read")
