"""A look into the slots of a model, without changing it."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glmix.models.glnet import Attention, GLMix
from glmix.models.merging import kept
from glmix.models.slots import at_least_float32


@dataclass
class SlotMaps:
    """What one GLMix block did with its slots, for a batch of images.

    Attributes:
        block: its name in the model, such as `stages.0.blocks.0`.
        stride: pixels of the image per place of the grid.
        logits: (B, M, h, w), float32 (float64 of a float64 model): similarity of M slots with every place of the h x w grid, scale included.
            The log size of merged slots is added, and `FAR` where an image has none, having fewer than others.
        slot_grid: rows and columns of the pooled seeds; None where slots are not pooled from a grid, or are merged.
        attention: (B, heads, M, M), of the same dtype: weights among the slots, each row sums to 1; None unless asked for.
        sizes: (B, M): seeds that were merged into each slot, 0 where an image has none; None where none are merged.
    """

    block: str
    stride: int
    logits: Tensor
    slot_grid: tuple[int, int] | None
    attention: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def slots(self) -> int:
        """Their number M."""
        return self.logits.shape[1]

    @property
    def assignment(self) -> Tensor:
        """(B, M, h, w): softmax over slots. How much of each place's global information comes from each slot."""
        return self.logits.softmax(1)

    @property
    def clustering(self) -> Tensor:
        """(B, M, h, w): softmax over pixels. How much of each slot comes from each place."""
        return self.logits.flatten(2).softmax(2).view_as(self.logits)

    def entropy(self, kind: str = "assignment") -> Tensor:
        """(B,): mean entropy of 'assignment' or 'clustering', divided by its largest value.

        1 is uniform: idle slots. A single slot, or a single place, leaves nothing to choose from, and counts as that.
        """
        axis = 1 if kind == "assignment" else 2
        log_weights = self.logits.flatten(2).log_softmax(axis)
        entropy = -(log_weights.exp() * log_weights).sum(axis).mean(1)
        size = torch.full_like(entropy, log_weights.shape[axis])
        if axis == 1 and self.sizes is not None:
            size = (self.sizes > 0).sum(1).to(entropy)
        return torch.where(size > 1, entropy / size.clamp(min=2).log(), torch.ones_like(entropy))

    def of_image(self, index: int) -> "SlotMaps":
        """The maps of one image, as a batch of 1 that has this image's own slots alone."""
        own = slice(None) if self.sizes is None else self.sizes[index] > 0
        attention = None if self.attention is None else self.attention[index : index + 1][:, :, own][:, :, :, own]
        sizes = None if self.sizes is None else self.sizes[index : index + 1, own]
        logits = self.logits[index : index + 1, own]
        return SlotMaps(self.block, self.stride, logits, self.slot_grid, attention, sizes)


@torch.no_grad()
def slot_maps(model: nn.Module, images: Tensor, attention: bool = False) -> list[SlotMaps]:
    """Slot maps of every GLMix block of `model` for `images`, in order of depth.

    Args:
        model: a GLNet, or anything that contains one (a head's `backbone`, wrapped, compiled, a feature extractor).
        images: (B, C, H, W) prepared as for the model, on any device and in any floating dtype; they are moved to the
            model's.
        attention: also return the attention among slots.

    Returns:
        One `SlotMaps` per GLMix block. The model, its mode and its gradients are left as they were.

    Raises:
        ValueError: the model has no GLMix blocks.
    """
    model = getattr(model, "_orig_mod", model)
    mixers = {name.removesuffix(".mixer"): m for name, m in model.named_modules() if isinstance(m, GLMix)}
    mixers = {name: mixer for name, mixer in mixers.items() if mixer.has_slots}
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no GLMix blocks, so no slots to look at")
    found: dict[str, dict[str, Any]] = {name: {} for name in mixers}
    reference = next(model.parameters())
    images = images.to(reference.device, reference.dtype)
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for name, mixer in mixers.items():

            def keep_logits(_m: nn.Module, _args: Any, output: Tensor, into: dict = found[name]) -> None:
                into["logits"] = output

            def keep_grid(_m: nn.Module, args: Any, into: dict = found[name]) -> None:
                into["size"] = tuple(args[0].shape[1:3])

            def keep_sizes(_m: nn.Module, _args: Any, output: Any, into: dict = found[name]) -> None:
                into["log_sizes"] = output[1]

            stack.callback(mixer.similarity.register_forward_hook(keep_logits).remove)
            if mixer.merging is not None:
                stack.callback(mixer.merging.register_forward_hook(keep_sizes).remove)
            stack.callback(mixer.register_forward_pre_hook(keep_grid).remove)
            if attention and isinstance(mixer.slot_attn, Attention):

                def keep_attention(m: Any, args: Any, _output: Any, into: dict = found[name]) -> None:
                    q, k, _ = at_least_float32(m.project(args[0])).unbind(0)
                    weights = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
                    weights = weights if args[1] is None else weights + args[1].unsqueeze(1).unsqueeze(2)
                    into["attention"] = weights.softmax(-1)

                stack.callback(mixer.slot_attn.register_forward_hook(keep_attention).remove)
        try:
            model.eval()(images)
        finally:
            for module, mode in modes.items():
                module.training = mode
    maps = []
    for name, seen in found.items():
        if "logits" not in seen:
            continue  # pruned away, or beyond the last feature level asked for
        h, w = seen["size"]
        logits = at_least_float32(seen["logits"]).unflatten(2, (h, w))
        mixer = mixers[name]
        slot_grid: Any = mixer.seeds.slot_grid
        sizes = None
        if "log_sizes" in seen:
            log_sizes = seen["log_sizes"].expand(len(logits), -1)
            logits, slot_grid = logits + log_sizes[:, :, None, None], None
            sizes = torch.where(kept(log_sizes), log_sizes.exp(), 0).round()
        maps.append(SlotMaps(name, mixer.stride, logits, slot_grid, seen.get("attention"), sizes))
    return maps
