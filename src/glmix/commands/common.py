"""What several commands share."""

from collections.abc import Sequence
from typing import Any

import torch

from glmix.data.samples import Skipped
from glmix.errors import UserError
from glmix.models import GLNet, load, network_of
from glmix.models.description import Description


def pick_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Names and reasons of what was left out, if anything was."""
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")


def load_for_slots(checkpoint: str, image_size: int = 0) -> tuple[GLNet, Description]:
    """As `load_for_images`, but of a head its GLNet alone: the slots are in it.

    Raises:
        UserError: the network has no slots.
    """
    model, described = load_for_images(checkpoint, image_size)
    net = network_of(model)
    if not isinstance(net, GLNet) or not net.slot_mixers():
        raise UserError(f"{checkpoint}: {described.model} as it was built has no GLMix blocks, so no slots to look at")
    return net, described


def load_for_images(checkpoint: str, image_size: int = 0) -> tuple[Any, Description]:
    """Model on its device and description of a checkpoint, which prepares images at `image_size` if that is given."""
    model, described = load(checkpoint)
    described.preparation = described.prepared.checked()
    if image_size:
        described.preparation = described.preparation.at(image_size)
    return model.to(pick_device()), described
