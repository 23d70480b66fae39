"""`glmix predict`."""

import json as json_module

import torch

from glmix.commands.common import load_for_images, pick_device, prepare_images
from glmix.errors import UserError
from glmix.models import SHIPPED


@torch.inference_mode()
def predict(
    images: list[str], checkpoint: str = SHIPPED, top: int = 3, image_size: int = 0, json: bool = False
) -> None:
    """What a model sees in images.

    Args:
        images: image files.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        top: classes to name per image.
        image_size: side of the images; 0 for that of the checkpoint.
        json: print one JSON object per image instead of sentences.
    """
    if top < 1:
        raise UserError(f"--top {top}: at least one")
    model, described, transform = load_for_images(checkpoint, image_size)
    names, tensors, skipped = prepare_images(images, transform)
    for name, tensor in zip(names, tensors, strict=True):
        probabilities = model(tensor[None].to(pick_device())).float().softmax(1)[0]
        best = probabilities.topk(min(top, len(probabilities)))
        found = [
            (described.names[i], round(p, 4)) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        if json:
            print(json_module.dumps({"image": name, "predictions": [{"name": n, "probability": p} for n, p in found]}))
        else:
            print(f"{name}: " + ", ".join(f"{n} {100 * p:.0f} %" for n, p in found))
    for reason in skipped:
        print(json_module.dumps({"image": reason.split(": ")[0], "error": reason}) if json else f"skipped {reason}")
    if not names:
        raise UserError("none of the images could be read")
