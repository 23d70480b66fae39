"""Maps spread through slots: what is known of some places comes to all that share a slot with them.

Dispatching D (N, M), whose rows sum to 1, times clustering C (M, N), whose rows sum to 1, is an affinity (N, N) of the
pixels whose rows sum to 1, of rank M at most. Applied as D(C x) it costs O(NM), and is never held.

Shapes: K maps, M slots, N = h*w places.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from glmix.models import GLNet
from glmix.models.glnet import KMeans
from glmix.models.slot_maps import SlotMaps, slot_maps
from glmix.models.slots import FAR


@dataclass(frozen=True)
class Way:
    """How maps are spread.

    Attributes:
        path: names of the blocks whose slots they go through, in this order; empty leaves them as they are.
        steps: how often through each.
        mix: share of what was spread in each step's outcome; the rest is the map as it came.
    """

    path: tuple[str, ...] = ()
    steps: int = 1
    mix: float = 1.0

    def __str__(self) -> str:
        if not self.path:
            return ""
        return (
            " > ".join(self.path)
            + (f", {self.steps} steps" if self.steps > 1 else "")
            + (f", {self.mix:g} of it" if self.mix < 1 else "")
        )


def spread(maps_Khw: Tensor, logits_Mhw: Tensor, steps: int = 1, mix: float = 1.0) -> Tensor:
    """Maps (K, h', w') of any grid, spread through slots to (K, h, w).

    Args:
        maps_Khw: brought to the slots' grid first, bilinear.
        logits_Mhw: similarities of slots and places, as in `SlotMaps`; of one image.
        steps: how often.
        mix: x becomes mix D(C x) + (1 - mix) of the map as it came.
    """
    h, w = logits_Mhw.shape[1:]
    start_KN = F.interpolate(maps_Khw[None], (h, w), mode="bilinear", antialias=True)[0].flatten(1)
    logits_MN = logits_Mhw.flatten(1).to(start_KN.dtype)
    clustering_MN, dispatching_MN = logits_MN.softmax(1), logits_MN.softmax(0)
    x_KN = start_KN
    for _ in range(steps):
        x_KN = mix * (x_KN @ clustering_MN.T) @ dispatching_MN + (1 - mix) * start_KN
    return x_KN.unflatten(1, (h, w))


def spread_by(maps_Khw: Tensor, blocks: dict[str, Tensor], way: Way) -> Tensor:
    """Maps (K, h', w') along a way through the logits (M, h, w) of `blocks`."""
    for name in way.path:
        maps_Khw = spread(maps_Khw, blocks[name], way.steps, way.mix)
    return maps_Khw


def logits_of(maps: Sequence[SlotMaps]) -> dict[str, Tensor]:
    """The logits (M, h, w) of each block, of the first image; on the CPU."""
    return {block.block: block.logits[0].float().cpu() for block in maps}


def logits_of_parts(parts: NDArray[Any]) -> Tensor:
    """Logits (M, H, W) of slots that are a partition (H, W) of the image: spreading takes the mean of each part."""
    labels = torch.from_numpy(parts)
    one_hot = F.one_hot(labels, int(labels.max()) + 1).permute(2, 0, 1)
    return torch.where(one_hot > 0, 0.0, FAR)


def kmeans_maps(model: GLNet, images: Tensor, rounds: int = 10) -> list[SlotMaps]:
    """As `slot_maps`, but with the parts that k-means makes of the same features, from the same seeds, by the same cosine.

    The network goes on with its own slots.
    """
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    clusters = KMeans(1.0, rounds, device=device)
    with ExitStack() as stack:
        for name, mixer in model.slot_mixers().items():

            def keep(_m: nn.Module, args: Any, _output: Any, name: str = name) -> None:
                found[name] = clusters(*args)

            stack.callback(mixer.similarity.register_forward_hook(keep).remove)
        maps = slot_maps(model, images)
    return [replace(m, logits=found[m.block].float().unflatten(2, m.logits.shape[2:])) for m in maps]
