"""Parameter groups and schedule, as the reference has them."""

from typing import Any

from timm.models import group_parameters
from timm.scheduler import create_scheduler_v2
from torch.optim import Optimizer

from glmix.models import GLNet


def parameter_groups(model: GLNet, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups by weight decay, and by depth where `layer_decay` is below 1 (`lr_scale`, which timm's schedules apply).

    Not decayed: biases, 1-D parameters, LayerScale, and what the model names in `no_weight_decay`. The 0-d slot scale
    is decayed, as in the reference, unless the model names it (pico and nano start it high and must keep it); timm's
    own rule, which exempts everything below 2-D, would do the opposite.
    """
    spared = model.no_weight_decay()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    deepest = max(layers.values())
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kept = parameter.ndim == 1 or name.endswith((".bias", ".gamma")) or name in spared
        layer = deepest if layer_decay == 1 else layers[name]
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
