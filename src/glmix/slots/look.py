"""A look at one photo: the whole of it, at a bounded size, through every GLMix block."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from glmix.data.images import full_size
from glmix.data.prepare import LEAST_SIDE, Preparation
from glmix.models import GLNet
from glmix.models.slot_maps import SlotMaps, slot_maps

IDLE = 0.97  # normalised assignment entropy from which slots count as idle: nothing to see in their maps
LONGEST = 4  # times the shorter side that the network is given: a longer photo is seen smaller
SHOWN = 384, 1024  # least and largest longer side, in pixels, of the photo in figures


def is_idle(entropy: float) -> bool:
    """Whether slots of this normalised assignment entropy are so close to uniform that there is nothing to see."""
    return entropy >= IDLE


@dataclass
class Look:
    """A photo and the slots that a model made of it.

    Attributes:
        name: of the photo.
        photo: the file's size, (W, H).
        seen: its size for the network, (W, H).
        shown: the photo for figures.
        maps: of every GLMix block, for this one image; on the CPU.
        found: the photo with what a head finds drawn into it, where that was asked for.
    """

    name: str
    photo: tuple[int, int]
    seen: tuple[int, int]
    shown: Image.Image
    maps: list[SlotMaps]
    found: Image.Image | None = None


def seen_size(photo: tuple[int, int], side: int) -> tuple[int, int]:
    """Size (W, H) at which the network sees a photo: the shorter side is `side`, the longer at most `LONGEST` times that.

    What is longer still is seen smaller, and of the longest the aspect is not kept: no side is below the network's stride.
    """
    scale = min(side / min(photo), LONGEST * side / max(photo))
    return max(LEAST_SIDE, round(photo[0] * scale)), max(LEAST_SIDE, round(photo[1] * scale))


def shown_photo(photo: Image.Image) -> Image.Image:
    """The photo with a longer side within `SHOWN`, so that neither a thumbnail nor a poster spoils a figure."""
    longer = max(photo.size)
    scale = min(max(longer, SHOWN[0]), SHOWN[1]) / longer
    return photo.resize(
        (max(8, round(photo.width * scale)), max(8, round(photo.height * scale))), Image.Resampling.LANCZOS
    )


def prepare_whole(photo: Image.Image, preparation: Preparation) -> Tensor:
    """The whole photo as the network's input (C, H, W): as `preparation` has it, but at `seen_size`, nothing cut off."""
    size = seen_size(photo.size, min(preparation.size))
    return preparation.tensor(photo.resize(size, preparation.resampling))


def look(model: GLNet, photo: Image.Image, preparation: Preparation, name: str = "", attention: bool = True) -> Look:
    """What `model` makes of a photo.

    Args:
        model: with the weights of a checkpoint.
        photo: RGB, of any size and aspect.
        preparation: of the checkpoint; the shorter side of its size becomes that of the photo.
        name: of the photo.
        attention: also keep the attention among slots.
    """
    tensor = prepare_whole(photo, preparation)
    maps = slot_maps(model, tensor[None], attention)
    for block in maps:
        block.logits = block.logits.cpu()
        block.attention = None if block.attention is None else block.attention.cpu()
        block.sizes = None if block.sizes is None else block.sizes.cpu()
    seen = (tensor.shape[2], tensor.shape[1])
    return Look(name, full_size(photo), seen, shown_photo(photo), maps)
