"""`glmix models`."""

import json as json_module
from typing import Any, cast

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from glmix.models import config_of
from glmix.models.glnet import MODEL_NAMES, PUBLISHED, PUBLISHED_PAGE, GLNet
from glmix.models.heads import HEADS, with_head
from glmix.models.heads.detect import Detector

DETECTORS = [name for name, head in HEADS.items() if issubclass(head, Detector)]


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


def count_under(name: str, head: str) -> dict[str, Any]:
    """As `count`, of a variant under a head: detectors of 80 classes at 800 x 1280, segmenters of 150 at 512 x 2048.

    Of Mask R-CNN as many regions and masks are counted as there are at most.
    """
    with torch.device("meta"):
        model: Any = with_head(timm.create_model(name, num_classes=0), {"name": head}, 80 if head in DETECTORS else 150)
    size = (800, 1280) if head in DETECTORS else (512, 2048)
    with FlopCounterMode(display=False) as counter:
        run = model.eval().every_layer if head in DETECTORS else model.eval()
        run(torch.empty(1, 3, *size, device="meta"))
    return {
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gmacs": counter.get_total_flops() / 2e9,
        "input": list(size),
    }


def models(json: bool = False, heads: bool = False) -> None:
    """The variants: parameters, multiply-adds, input size, published accuracy.

    Args:
        heads: instead, what each costs under each head of dense tasks.
        json: print one JSON object instead of a table.
    """
    if heads:
        costs = {name: {head: count_under(name, head) for head in HEADS} for name in MODEL_NAMES}
        print(json_module.dumps(costs) if json else heads_table(costs))
        return
    table: dict[str, dict[str, Any]] = {name: count(name) | {"published": PUBLISHED.get(name)} for name in MODEL_NAMES}
    if json:
        print(json_module.dumps(table))
        return
    print(f"{'model':<22}{'params, M':>10}{'GMACs':>8}{'input':>7}{'ImageNet-1k top-1':>20}")
    for name, row in table.items():
        top1 = f"{row['published']['top1']:.1f} %" if row["published"] else "-"
        print(f"{name:<22}{row['params_m']:>10.1f}{row['gmacs']:>8.2f}{row['input']:>7}{top1:>20}")
    print(f"top-1 as published: {PUBLISHED_PAGE}; '-': ours, no ImageNet training yet")


def heads_table(costs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Millions of parameters and GMACs, a row a variant and a column a head."""
    lines = [f"{'parameters, M / GMACs':<22}" + "".join(f"{head:>18}" for head in HEADS)]
    for name, row in costs.items():
        cells = [
            f"{row[head]['params_m']:.1f} / {row[head]['gmacs']:.{0 if row[head]['gmacs'] >= 100 else 1}f}"
            for head in HEADS
        ]
        lines.append(f"{name:<22}" + "".join(f"{cell:>18}" for cell in cells))
    sizes = {head: cost["input"] for head, cost in next(iter(costs.values())).items()}
    return "\n".join([*lines, ", ".join(f"{head} at {h} x {w}" for head, (h, w) in sizes.items())])
