"""What detectors and segmenters share."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from glmix.errors import UserError
from glmix.models import load_body, network_of
from glmix.models.description import Description
from glmix.ranges import NonNegativeInt
from glmix.training.options import TrainOptions


@dataclass
class DenseOptions(TrainOptions):
    """Options of `glmix train` for dense tasks.

    Args:
        head: what stands on the backbone.
        head_channels: width of the head; 0 for the published one, or 64 on small backbones.
        backbone_norm: frozen.
        freeze_stages: how many.
    """

    head: str = ""
    head_channels: NonNegativeInt = 0
    backbone_norm: Literal["frozen", "sync", "train"] = "frozen"
    freeze_stages: NonNegativeInt = 0

    GROUPS: ClassVar[dict[str, str]] = TrainOptions.GROUPS | {"head": "the head"}

    def described_head(self) -> dict[str, Any]:
        return {"name": self.head, "head_channels": self.head_channels}


def start(model: nn.Module, options: DenseOptions, description: Description) -> str:
    said = load_body(model, options.init, description.classes) if options.init else ""
    net = network_of(model)
    if options.backbone_norm == "frozen" and options.init:
        for part in net.modules():
            if isinstance(part, _BatchNorm):
                part.requires_grad_(False)
    if options.freeze_stages:
        net.stem.requires_grad_(False)
        net.stages[: options.freeze_stages].requires_grad_(False)
    return said
