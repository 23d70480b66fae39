"""Heads for dense tasks, on the stages of a backbone."""

from typing import Any

from torch import nn

from glmix.errors import UserError
from glmix.models.heads.detect import MaskRCNN, RetinaNet
from glmix.models.heads.pyramid import Pyramid
from glmix.models.heads.segment import SemanticFPN, UPerNet

# a head's class by its name: called with the backbone, the number of classes and the head's own options
HEADS: dict[str, type[nn.Module]] = {
    "retinanet": RetinaNet,
    "mask-rcnn": MaskRCNN,
    "semantic-fpn": SemanticFPN,
    "upernet": UPerNet,
}


def with_head(backbone: nn.Module, head: dict[str, Any], classes: int) -> nn.Module:
    """A backbone under a head.

    Args:
        backbone: a GLNet, or another network of timm with four stages; it is pruned to these.
        head: `name`, and the options of that head.
        classes: without background.

    Raises:
        UserError: no head of that name.
    """
    options = dict(head)
    name = options.pop("name")
    if name not in HEADS:
        raise UserError(f"no head {name!r}; there are {', '.join(HEADS)}")
    return HEADS[name](backbone, classes, **options)


__all__ = ["HEADS", "Pyramid", "with_head"]
