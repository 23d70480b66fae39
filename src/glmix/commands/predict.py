"""`glmix predict`."""

import json as json_module
from pathlib import Path
from typing import Any

import torch

from glmix.commands.common import load_for_images, pick_device
from glmix.data.images import BadImage, read_image
from glmix.data.samples import Sample
from glmix.errors import UserError
from glmix.files import written_whole
from glmix.models import SHIPPED
from glmix.tasks import task_named


@torch.inference_mode()
def predict(
    images: list[str],
    checkpoint: str = SHIPPED,
    top: int | None = None,
    image_size: int = 0,
    pictures: str = "",
    json: bool = False,
) -> None:
    """What a model sees in images.

    Args:
        images: image files.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        top: answers per image at most; left out, three classes, or all objects.
        image_size: side of the images; 0 for that of the checkpoint.
        pictures: folder for pictures of what was found, of segmenters and detectors; of the latter also predictions.json,
            in COCO's form and with the category ids of the data.
        json: print one JSON object per image instead of sentences.
    """
    if top is not None and top < 1:
        raise UserError(f"--top {top}: at least one")
    model, described = load_for_images(checkpoint, image_size)
    task = task_named(described.task)
    transform = task.evaluation(described.prepared)
    if pictures and task.draw is None:
        raise UserError(f"--pictures: nothing to draw; {checkpoint} is for {task.name}")
    rows: list[dict[str, Any]] = []
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
        outputs = task.forward(model, batch)
        (answers,) = task.decode(outputs, batch, described, top or task.usual_top)
        used += 1
        if pictures and task.draw is not None:
            Path(pictures).mkdir(parents=True, exist_ok=True)
            for kind, drawn in task.draw(picture, outputs[0], described).items():
                with written_whole(Path(pictures) / f"{Path(path).stem}.{kind}.png") as file:
                    drawn.save(file, "PNG")
        row = {"image": path, "predictions": answers}
        if pictures and task.collect is not None:
            rows.append(row | {"size": picture.info["full_size"][::-1]})
        print(json_module.dumps(row) if json else f"{path}: {task.tell(answers)}", flush=True)
    if not used:
        raise UserError("none of the images could be read")
    if rows and task.collect is not None:
        with written_whole(Path(pictures) / "predictions.json", "w", encoding="utf-8") as file:
            json_module.dump(task.collect(rows, described), file)
