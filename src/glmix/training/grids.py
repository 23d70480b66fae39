"""One model for any number of slots: each step of a training draws the grid that seeds are pooled from."""

from typing import Any

import numpy as np
from torch import nn

from glmix.errors import UserError
from glmix.models import GLNet, network_of


def drawn_grid(sides: tuple[int, int], seed: int, epoch: int, batch: int) -> tuple[int, int]:
    """A square grid with a side from the smallest to the largest of `sides`, each as likely.

    It hangs on seed, epoch and batch alone: the same on every process, and again where a run goes on.
    """
    side = int(np.random.default_rng((seed, epoch, batch)).integers(sides[0], sides[1] + 1))
    return side, side


def finest_places(model: nn.Module, side: int) -> int:
    """Rows of the finest map that slots are gathered from, of images of `side` px."""
    net: Any = network_of(model)
    strides = [mixer.stride for mixer in net.slot_mixers().values()] if isinstance(net, GLNet) else []
    return side // min(strides, default=net.feature_info[0]["reduction"])


def check_grids(model: nn.Module, sides: tuple[int, int], least_image: int) -> None:
    """Refuse sides that this model cannot have.

    Args:
        least_image: side in pixels of the smallest training images; 0 if not known.

    Raises:
        UserError: the slots are not pooled from a grid, or the largest grid has more places than the finest map.
    """
    if own_grid(model) is None:
        raise UserError("--slot-grids: this network has no slots that are pooled from a grid; leave it out")
    finest = finest_places(model, least_image)
    if least_image and sides[1] > finest:
        raise UserError(
            f"--slot-grids {sides[0]} {sides[1]}: images of {least_image} px have {finest} x {finest} places in the finest "
            f"map; {finest} at most"
        )


def own_grid(model: nn.Module) -> tuple[int, int] | None:
    """The grid of a network's slots; None where they are not pooled from one, or there are none."""
    net = network_of(model)
    mixers = net.slot_mixers().values() if isinstance(net, GLNet) else []
    grids = {mixer.seeds.slot_grid for mixer in mixers}
    return next(iter(grids)) if len(grids) == 1 else None


def set_grid(model: nn.Module, grid: tuple[int, int]) -> None:
    """As `GLNet.set_slot_grid`, of the network in `model`."""
    network_of(model).set_slot_grid(grid)
