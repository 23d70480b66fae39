"""`glmix slots`."""

import json as json_module
from pathlib import Path
from typing import Any

import torch

from glmix.commands.common import load_for_slots, pick_device, print_skipped
from glmix.console import progress
from glmix.data.samples import spread
from glmix.data.voc import open_masks
from glmix.errors import UserError
from glmix.models import SHIPPED, create_model
from glmix.slots.figures import figure_path, save_figure
from glmix.slots.quality import MEASURES, plot_quality, slot_quality


def slots(
    data: str,
    checkpoint: str = SHIPPED,
    random_weights: bool = False,
    image_size: int = 0,
    slot_grid: tuple[int, int] | None = None,
    limit: int = 0,
    figure: str = "",
    json: bool = False,
) -> None:
    """How well the slots match masks of objects: best-match IoU, boundary recall and purity of every block's slots.

    Beside them stand the same of square patches and of SLIC superpixels, as many as there are slots.

    Args:
        data: a folder in PASCAL VOC's layout (the split val), or 'scenes'.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        random_weights: the model as it is before training, for comparison.
        image_size: shorter side at which the network sees an image; 0 for that of the checkpoint.
        slot_grid: rows and columns of the pooled slots, such as [2, 2], to see what fewer or more of them do.
        limit: images at most, spread evenly over the data; 0 for all.
        figure: file for a picture of the measures over depth, such as quality.png.
        json: print one JSON object instead of a table.
    """
    if limit < 0:
        raise UserError(f"--limit {limit}: at least 1, or 0 for all")
    model, described = load_for_slots(checkpoint, image_size)
    preparation = described.prepared  # which `load` always fills in
    if random_weights:
        torch.manual_seed(0)
        arguments: dict[str, Any] = {"in_chans": preparation.channels} | described.model_args
        model = create_model(described.model, num_classes=model.num_classes, **arguments).eval()
        model.to(pick_device())
    try:
        if slot_grid is not None:
            rows, columns = slot_grid
            model.set_slot_grid((rows, columns))
    except ValueError as error:
        raise UserError(f"--slot-grid: {error}") from error
    images = open_masks(data)
    file = figure_path(figure) if figure else None  # before the work, which a mistake here would lose
    images = images.take(spread(len(images), limit))
    scores, used, skipped = slot_quality(model, images, preparation, progress)
    if not used:
        raise UserError(f"{data}: none of {len(skipped)} images can be read (first: {skipped[0]})")
    if json:
        print(json_module.dumps({"images": used, "skipped": [s._asdict() for s in skipped], "measures": scores}))
    else:
        print(f"{used} images; a region is where a slot is the strongest")
        print(table(scores))
        print_skipped(skipped)
    if file:
        weights = "random weights" if random_weights else f"weights of {checkpoint}"
        save_figure(plot_quality(scores, f"{described.model}, {weights}; {used} images of {Path(data).name}"), file)


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Rows of measures."""
    columns = {"entropy": "entropy"} | MEASURES | {"regions": "regions", "boundary": "boundary pixels"}
    lines = [f"{'':<18}" + "".join(f"{label:>17}" for label in columns.values())]
    for name, row in scores.items():
        cells = [f"{row[key]:.1f}" if key == "regions" else f"{row[key]:.3f}" if key in row else "" for key in columns]
        lines.append(f"{name:<18}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
