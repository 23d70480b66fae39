"""What several commands share."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmix.data.images import BadImage, read_image
from glmix.data.transforms import evaluation_transform
from glmix.errors import UserError
from glmix.models import GLNet, load
from glmix.models.weights import Checkpoint


def pick_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_workers() -> int:
    """Processes that load images: half of the cores, at most 8."""
    return min(8, max(1, (os.cpu_count() or 1) // 2))


def load_for_images(checkpoint: str, image_size: int = 0) -> tuple[GLNet, Checkpoint, Any]:
    """Model, checkpoint and the transform that prepares images for it, at `image_size` if that is given."""
    model, described = load(checkpoint)
    if image_size:
        if image_size < 32:
            raise UserError(f"--image-size {image_size} is below 32, the network's stride")
        described.image["input_size"] = (described.image["input_size"][0], image_size, image_size)
    return model.to(pick_device()), described, evaluation_transform(described.image)


def prepare_images(paths: list[str], transform: Any) -> tuple[list[str], list[Tensor], list[str]]:
    """The usable ones of `paths`, their tensors (C, H, W), and why the others are not."""
    names, tensors, skipped = [], [], []
    for path in paths:
        try:
            if Path(path).is_dir():
                raise BadImage(f"{path}: a folder, not an image")
            tensors.append(transform(read_image(path)))
            names.append(path)
        except BadImage as error:
            skipped.append(str(error))
    return names, tensors, skipped
