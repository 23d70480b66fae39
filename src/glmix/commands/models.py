"""`glmix models`."""

import json as json_module
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from glmix.errors import UserError
from glmix.export.measure import in_own_process, multiply_adds_of
from glmix.models import check_name, config_of
from glmix.models.glnet import MODEL_NAMES, PUBLISHED, PUBLISHED_PAGE, GLNet
from glmix.models.heads import HEADS, with_head
from glmix.models.heads.detect import Detector
from glmix.ranges import NonNegativeInt

DETECTORS = [name for name, head in HEADS.items() if issubclass(head, Detector)]


@cache
def count(name: str) -> dict[str, float]:
    """Parameters and multiply-adds, in millions and billions, at the variant's input size.

    The operations counted are convolutions, matrix products and attention, as in the published figures.
    """
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    side = config_of(cast(GLNet, model))["input_size"]
    return {
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gmacs": multiply_adds_of(model, torch.empty(1, *side, device="meta")),
        "input": side[-1],
    }


def under(name: str, head: str) -> tuple[nn.Module, Callable[[Tensor], Any], tuple[int, int]]:
    """A variant under a head, what runs all of its layers, and the size of picture that papers tell its cost at."""
    model: Any = with_head(
        timm.create_model(name, num_classes=0), {"name": head}, 80 if head in DETECTORS else 150
    ).eval()
    return (model, model.every_layer, (800, 1280)) if head in DETECTORS else (model, model, (512, 2048))


def every_layer_of(name: str, head: str) -> Callable[[], Any]:
    """A pass of every layer, ready to be measured."""
    _, run, size = under(name, head)
    run(torch.randn(1, 3, 64, 64))
    picture = torch.randn(1, 3, *size)
    return lambda: run(picture)


def count_under(name: str, head: str) -> dict[str, Any]:
    """As `count`, of a variant under a head: detectors of 80 classes at 800 x 1280, segmenters of 150 at 512 x 2048.

    Of Mask R-CNN as many regions and masks are counted as there are at most.
    """
    with torch.device("meta"):
        model, every_layer, size = under(name, head)
    return {
        "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gmacs": multiply_adds_of(every_layer, torch.empty(1, 3, *size, device="meta")),
        "input": list(size),
    }


def models(json: bool = False, heads: bool = False, measure: str = "", threads: NonNegativeInt = 0) -> None:
    """The variants: parameters, multiply-adds, input size, published accuracy.

    Args:
        heads: instead, what each costs under each head of dense tasks.
        measure: of these, with commas between, seconds and memory of a picture under each head, on this machine's CPU.
        threads: to measure with; 0 for all cores.
        json: print one JSON object instead of a table.
    """
    if threads and not measure:
        raise UserError("--threads: with --measure alone")
    if measure or heads:
        names = [check_name(name.strip()) for name in measure.split(",")] if measure else MODEL_NAMES
        what = "seconds / MiB" if measure else "parameters, M / GMACs"
        cost = partial(measure_under, threads) if measure else count_under
        if json:
            print(json_module.dumps({name: {head: cost(name, head) for head in HEADS} for name in names}))
        else:
            print_under_heads(what, names, cost)
        return
    if json:
        print(json_module.dumps({name: count(name) | {"published": PUBLISHED.get(name)} for name in MODEL_NAMES}))
        return
    print(f"{'model':<22}{'params, M':>10}{'GMACs':>8}{'input':>7}{'ImageNet-1k top-1':>20}")
    for name in MODEL_NAMES:
        row, published = count(name), PUBLISHED.get(name)
        top1 = f"{published['top1']:.1f} %" if published else "-"
        print(f"{name:<22}{row['params_m']:>10.1f}{row['gmacs']:>8.2f}{row['input']:>7}{top1:>20}", flush=True)
    print(f"top-1 as published: {PUBLISHED_PAGE}; '-': ours, no ImageNet training yet")


def measure_under(threads: int, name: str, head: str) -> dict[str, Any]:
    """Seconds of a picture (float32, median of three) and MiB over those of the loaded model, at the sizes of `count_under`."""
    peak, seconds = in_own_process(every_layer_of, name, head, threads=threads or os.cpu_count() or 1, timed=3)
    return {"seconds": seconds, "peak_mib": peak}


def print_under_heads(what: str, names: Iterable[str], cost: Callable[[str, str], dict[str, Any]]) -> None:
    """A table of a row a variant and a column a head, each row when it is there: large ones take minutes."""
    print(f"{what:<22}" + "".join(f"{head:>18}" for head in HEADS), flush=True)
    for name in names:
        cells = [shown(cost(name, head)) for head in HEADS]
        print(f"{name:<22}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    print("detectors at 800 x 1280 with as many regions as there are at most, segmenters at 512 x 2048")


def shown(cost: dict[str, Any]) -> str:
    """What `measure_under` or `count_under` found, in a cell."""
    if "seconds" in cost:
        return f"{cost['seconds']:.2f} / {cost['peak_mib']:.0f}"
    return f"{cost['params_m']:.1f} / {cost['gmacs']:.{0 if cost['gmacs'] >= 100 else 1}f}"
