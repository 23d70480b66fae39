"""`glmix models`."""

import json as json_module
from typing import Any, cast

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from glmix.models import config_of
from glmix.models.glnet import MODEL_NAMES, PUBLISHED, PUBLISHED_PAGE, GLNet


def count(name: str) -> dict[str, float]:
    """Parameters and multiply-adds, in millions and billions, at the variant's input size.

    The operations counted are convolutions, matrix products and attention, as in the published figures.
    """
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    side = config_of(cast(GLNet, model))["input_size"]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *side, device="meta"))
    return {
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gmacs": counter.get_total_flops() / 2e9,
        "input": side[-1],
    }


def models(json: bool = False) -> None:
    """The variants: parameters, multiply-adds, input size, published accuracy.

    Args:
        json: print one JSON object instead of a table.
    """
    table: dict[str, dict[str, Any]] = {name: count(name) | {"published": PUBLISHED.get(name)} for name in MODEL_NAMES}
    if json:
        print(json_module.dumps(table))
        return
    print(f"{'model':<22}{'params, M':>10}{'GMACs':>8}{'input':>7}{'ImageNet-1k top-1':>20}")
    for name, row in table.items():
        top1 = f"{row['published']['top1']:.1f} %" if row["published"] else "-"
        print(f"{name:<22}{row['params_m']:>10.1f}{row['gmacs']:>8.2f}{row['input']:>7}{top1:>20}")
    print(f"top-1 as published: {PUBLISHED_PAGE}; '-': ours, no ImageNet training yet")
