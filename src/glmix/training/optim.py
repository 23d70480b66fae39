"""Parameter groups and schedule, as the reference has them."""

from typing import Any

from timm.models import group_parameters
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from glmix.models import backbone_of


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, spare_scalars: bool = False
) -> list[dict[str, Any]]:
    """Groups by weight decay, and by depth where `layer_decay` is below 1 (`lr_scale`, which timm's schedules apply).

    Not decayed: biases, 1-D parameters, LayerScale, and what the backbone names in `no_weight_decay`. The 0-d slot
    scale is decayed, as in the reference, unless the backbone names it (pico and nano start it high and must keep it).
    With `spare_scalars` it is not, as in the reference's training with token labels, which has timm's own rule. What is
    outside the backbone (a head) learns as its last layer does.
    """
    backbone = backbone_of(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is backbone)
    spared = {prefix + name for name in backbone.no_weight_decay()}
    depths = group_parameters(backbone, backbone.group_matcher(), reverse=True)
    layers = {prefix + name: layer for name, layer in depths.items()}
    deepest = max(layers.values())
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim == 1 or (spare_scalars and parameter.ndim == 0)
        kept = kept or name.endswith((".bias", ".gamma")) or name in spared
        layer = deepest if layer_decay == 1 else layers.get(name, deepest)
        fresh = {
            "params": [],
            "weight_decay": 0.0 if kept else weight_decay,
            "lr_scale": layer_decay ** (deepest - layer),
        }
        groups.setdefault((kept, layer), fresh)["params"].append(parameter)
    return list(groups.values())


def cosine(optimizer: Optimizer, epochs: int, steps_per_epoch: int, warmup_epochs: int, min_lr: float) -> Any:
    """timm's cosine with linear warm-up, moved step by step; warm-up is part of `epochs`."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=min(warmup_epochs, epochs - 1),
        warmup_lr=1e-6,
        min_lr=min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
