"""Parameter groups and schedule, as the reference has them."""

from typing import Any

from timm.scheduler import create_scheduler_v2
from torch import nn

from glmix.models import GLNet
from torch.optim import Optimizer


def parameter_groups(model: GLNet, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: decayed, and not (biases, 1-D parameters, LayerScale, and what the model names itself).

    The 0-d slot scale is decayed, as in the reference, unless the model names it in `no_weight_decay` (pico and nano
    start it high and must keep it). timm's rule, which exempts everything below 2-D, would do the opposite.
    """
    spared = model.no_weight_decay()
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = parameter.ndim == 1 or name.endswith((".bias", ".gamma")) or name in spared
            (kept if keep else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


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
