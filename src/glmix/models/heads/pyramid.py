"""The stages of a backbone, as dense heads want them."""

from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from glmix.errors import UserError

STRIDES = (4, 8, 16, 32)
SMALL = 6_000_000  # parameters: backbones below that get narrow heads, which else would cost many times as much


class Pyramid(nn.Module):
    """What every dense head stands on: holds a pruned `backbone`, and a norm for the output of each of its stages.

    Attributes:
        backbone: a GLNet, or another network of timm, without classifier and final norm.
        channels: of the stages, finest first.
        strides: pixels from one place to the next, of each stage.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        stages = {info["reduction"]: (i, info["num_chs"]) for i, info in enumerate(backbone.feature_info)}
        if not set(STRIDES) <= set(stages):
            name = type(backbone).__name__
            raise UserError(f"{name} has stages of strides {sorted(stages)}; heads stand on strides 4, 8, 16 and 32")
        self.places = [stages[stride][0] for stride in STRIDES]  # others, such as ResNet's stem at 2, are passed over
        backbone.prune_intermediate_layers(self.places, prune_norm=True, prune_head=True)
        self.backbone = backbone
        self.channels: list[int] = [stages[stride][1] for stride in STRIDES]
        self.strides: list[int] = list(STRIDES)
        self.norms = nn.ModuleList(LayerNorm2d(channels) for channels in self.channels)

    @staticmethod
    def usual_width(backbone: nn.Module, published: int) -> int:
        """Channels of a head where none are asked for: those of the papers, and 64 on a small backbone."""
        return 64 if sum(p.numel() for p in backbone.parameters()) < SMALL else published

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass; the head's are kept."""
        self.backbone.set_grad_checkpointing(enable)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Normalised outputs of the stages (B, C, H / stride, W / stride) of images (B, 3, H, W), finest first."""
        found = self.backbone.forward_intermediates(images, indices=self.places, intermediates_only=True)
        return [norm(stage) for norm, stage in zip(self.norms, found, strict=True)]
