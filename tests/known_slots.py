"""A network whose slots are known: each has the places of one colour, so that a picture says what figures must show."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import glmix
from glmix.data.prepare import Preparation

PREPARATION = Preparation(size=(64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
SLOTS = "RGB."  # slot 0 has what is red, 1 what is green, 2 what is blue, 3 what is dark
CELL = 16  # pixels, as many as the largest stride: of every block a place or more
PLAN = ["RR....BB", "RR....BB", "....GGGG", "....GGGG"]  # mirrored, flipped, turned or shifted it is another
TRUTH = np.array([[SLOTS.index(letter) for letter in row] for row in PLAN])  # (4, 8) slot of each cell


def drawn(truth: np.ndarray = TRUTH) -> Image.Image:
    """The picture of a plan."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    return Image.fromarray(colours[truth.repeat(CELL, 0).repeat(CELL, 1)])


def cells(picture: Any, rows: int = 4) -> np.ndarray:
    """What is in the middle of each cell of a picture (H, W, ...) of any size."""
    array = np.asarray(picture)
    side = array.shape[0] / rows
    rows_at, columns_at = (((np.arange(round(n / side)) + 0.5) * side).astype(int) for n in array.shape[:2])
    return array[np.ix_(rows_at, columns_at)]


class ByColour(nn.Module):
    """In place of a block's similarity: 20 where a slot's colour is, else 0, and `bias` of each slot on top.

    What a bias adds changes which slot is the strongest at a place (assignment), and not what a slot gathers
    (clustering). Slots beyond the four colours have nothing.
    """

    def __init__(self, seen: dict[str, Tensor], stride: int, slots: int, bias: tuple[float, ...]) -> None:
        super().__init__()
        self.seen, self.stride, self.slots = seen, stride, slots
        self.bias = torch.tensor([*bias, *[-20.0] * (slots - 4)])[:, None]

    def forward(self, _seeds_BMC: Tensor, _x_BNC: Tensor) -> Tensor:
        image_BCHW = self.seen["image"]
        h, w = (-(-n // self.stride) for n in image_BCHW.shape[2:])
        colour = F.adaptive_avg_pool2d(image_BCHW, (h, w)).flatten(2)
        dark = 1 - colour.amax(1, keepdim=True)
        nothing = torch.zeros(len(colour), self.slots - 4, h * w)
        return 20 * torch.cat([colour, dark, nothing], 1) + self.bias


def known_model(slots: int = 4, bias: tuple[float, ...] = (0.0,) * 4, **arguments: Any) -> Any:
    """A GLNet with `ByColour` slots in every block; its `seen["image"]` is what it was given last."""
    model = glmix.create_model("glnet_pico", num_classes=2, **{"slot_grid": (2, slots // 2)} | arguments).eval()
    model.seen = {}
    model.register_forward_pre_hook(lambda _m, images: model.seen.update(image=images[0].clone()))
    for mixer in model.slot_mixers().values():
        mixer.similarity = ByColour(model.seen, mixer.stride, slots, bias)
    return model
