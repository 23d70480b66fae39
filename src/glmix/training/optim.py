"""Parameter groups and schedule, as the reference has them."""

from typing import Any

from timm.models import group_parameters
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from torch import nn
from torch.optim import Optimizer

from glmix.models import network_of
from glmix.training.options import TrainOptions


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, spare_scalars: bool = False
) -> list[dict[str, Any]]:
    """Groups by weight decay, and by depth where `layer_decay` is below 1 (`lr_scale`, which timm's schedules apply).

    Not decayed: biases, 1-D parameters, LayerScale, and what the backbone names in `no_weight_decay`. The 0-d slot
    scale is decayed, as in the reference, unless the backbone names it (pico and nano start it high and must keep it).
    With `spare_scalars` it is not, as in the reference's training with token labels, which has timm's own rule. What is
    outside the backbone (a head) learns as its last layer does.
    """
    backbone = network_of(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is backbone)
    spared = {prefix + name for name in getattr(backbone, "no_weight_decay", set)()}
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


def schedule(optimizer: Optimizer, options: TrainOptions, steps_per_epoch: int) -> Any:
    """timm's schedule of a run, moved step by step; warm-up is part of its epochs."""
    steps = options.epochs * steps_per_epoch
    warmup = options.warmup_steps or options.warmup_epochs * steps_per_epoch
    warmup = min(warmup, steps - steps_per_epoch if options.warmup_epochs else steps - 1)
    shared: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": options.warmup_lr,
        "warmup_prefix": options.warmup_prefix,
        "t_in_epochs": False,
    }
    length = steps - warmup if options.warmup_prefix else steps
    if options.schedule == "cosine":
        return CosineLRScheduler(optimizer, length, lr_min=options.min_lr, **shared)
    if options.schedule == "poly":
        return PolyLRScheduler(optimizer, length, options.poly_power, lr_min=options.min_lr, **shared)
    before = warmup if options.warmup_prefix else 0  # milestones are told from the beginning of the run
    falls = [epoch * steps_per_epoch - before + 1 for epoch in options.milestones]  # timm's come a step early
    return MultiStepLRScheduler(optimizer, falls, 0.1, **shared)
