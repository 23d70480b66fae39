"""`glmix eval --task weak-segment`."""

import json as json_module
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from glmix.commands.common import load_for_slots, pick_device, print_skipped, set_grid
from glmix.console import aligned, progress, say
from glmix.data.masks import open_maps
from glmix.data.samples import DataSet, Source, spread
from glmix.errors import UserError
from glmix.models import GLNet, build
from glmix.models.description import Description
from glmix.slots.class_maps import SCALES, MapKind, linear_classifier
from glmix.slots.label_head import features_and_labels, fit_label_head, mean_precision
from glmix.slots.weak import FIXED, Seer, measure_weakly
from glmix.slots.weak_page import COLUMNS, cells_of, examples, write_weak_page

BACKGROUND = ("background", "0")


def weak_segment(
    data: str,
    checkpoint: str,
    image_size: int,
    slot_grid: tuple[int, int] | None,
    maps: MapKind,
    scales: Sequence[float] | None,
    limit: int,
    report: str,
    json: bool,
) -> None:
    """mIoU of masks that come from image labels; the options are those of `glmix eval`."""
    model, described = classifier_with_slots(checkpoint, image_size)
    if scales and min(scales) <= 0:
        raise UserError(f"--scales {list(scales)}: above 0")
    opened = open_maps(data)
    images = opened.split("val")
    if images.classes[0].lower() not in BACKGROUND:
        raise UserError(f"{data}: its first class is {images.classes[0]}; the measure is of objects and a background, as in "
                        "PASCAL VOC or --data scenes")  # fmt: skip
    images = images.take(spread(len(images), limit))
    if len(images) < 2:
        raise UserError(f"{data}: {len(images)} image; at least 2 are needed, to choose on and to report")
    try:
        classifier, rows, told = classifier_for(model, described, opened, images)
        nets = [model, unlearned(described)]
        for net in nets:
            if slot_grid:
                set_grid(net, slot_grid, described)
        seer = Seer(model, described.prepared, classifier, maps, tuple(scales or SCALES))
        found = measure_weakly(seer, images, rows, nets[1], progress)
    except ValueError as error:
        raise UserError(f"{checkpoint} on {data}: {error}") from error
    told += (
        f" Class maps: {maps}, mirrored, at scales {', '.join(f'{s:g}' for s in seer.scales)}. Chosen on "
        f"{found.chosen_on} images, reported on {len(found.reported)} others; 95 % intervals of differences in pairs."
    )
    if json:
        skipped = [one._asdict() for one in found.skipped]
        rows_ = [row.plain() for row in found.rows]
        about = {"images": len(found.reported), "chosen_on": found.chosen_on, "classes": images.names, "about": told}
        print(json_module.dumps(about | {"skipped": skipped, "fixed_threshold": FIXED, "rows": rows_}))
    else:
        print(told)
        print(aligned([list(COLUMNS), *map(cells_of, found.rows)], left=2))
        print_skipped(found.skipped)
    if report:
        shown = examples(seer, images, rows, found)
        page = write_weak_page(Path(report), found, shown, f"Masks from image labels: {checkpoint} on {data}", told)
        if not json:
            print(page)


def classifier_with_slots(checkpoint: str, image_size: int) -> tuple[GLNet, Description]:
    """As `load_for_slots`, of a classifier.

    Raises:
        UserError: it is for another task, or scores by more than a linear layer of mean features.
    """
    model, described = load_for_slots(checkpoint, image_size)
    if described.task not in ("classify", "token-label"):
        raise UserError(f"{checkpoint}: for {described.task}; masks from image labels are had from a classifier")
    try:
        linear_classifier(model)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return model.eval(), described


def unlearned(described: Description) -> GLNet:
    """The network of a description as it is before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(replace(described, head={}))
    assert isinstance(net, GLNet)
    return net.eval().to(pick_device())


def classifier_for(
    model: GLNet, described: Description, opened: DataSet, images: Source
) -> tuple[nn.Linear, dict[int, int], str]:
    """The model's own classifier where it knows all classes of the data; else one fitted on the training images' labels.

    Returns:
        It, its row of each class number of the data's maps, and what to say of it.
    """
    wanted = images.classes[1:]
    if set(wanted) <= set(described.classes):
        rows = {number: described.classes.index(name) for number, name in enumerate(wanted, 1)}
        return linear_classifier(model), rows, "The model's own classifier."
    train = opened.split("train")
    say(f"the model does not know all of {', '.join(wanted[:3])} …: a linear classifier of its features is fitted on all "
        f"{len(train)} training images; --limit is of those measured")  # fmt: skip
    features, labels = features_and_labels(model, described.prepared, train, progress)
    layer = fit_label_head(features, labels)
    precision = mean_precision(layer, *features_and_labels(model, described.prepared, images, progress))
    told = (
        f"A linear classifier of frozen features, from the labels of {len(labels)} training images: mean average precision "
        f"{precision:.1f} % on those measured."
    )
    return layer.to(pick_device()), {number: number - 1 for number in range(1, len(images.classes))}, told
