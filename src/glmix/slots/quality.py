"""How meaningful slots are, in numbers: their regions against the masks of objects, block by block.

A region is where a slot is the strongest. The same is asked of the square patches with as many parts, and of SLIC
superpixels (Achanta et al., 2012, by scikit-image); pooled seeds begin as those squares, so these are what slots have to
beat. Each figure is of one image, then the mean over images:

- `best_iou`: of each object, the largest intersection over union with one region. One of 49 parts hardly covers an
  object, so this is small for small objects, and larger parts do better.
- `boundary_recall`: share of the masks' boundary within 2 pixels (per 400 of the longer side) of a region boundary. More
  boundary recalls more: `boundary` gives the regions' share of boundary pixels.
- `purity`: share of pixels in the majority object (or background) of their region.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import from_numpy

from glmix.data.prepare import Preparation
from glmix.data.samples import Skipped, Source
from glmix.data.voc import VOID
from glmix.errors import needs
from glmix.models import GLNet
from glmix.models.slot_maps import slot_maps
from glmix.slots.look import prepare_whole
from glmix.slots.regions import boundaries, patch_grid, square_patches, strongest_slots

LONGEST_SIDE = 1024  # pixels at which masks are compared
MEASURES = {"best_iou": "best-match IoU", "boundary_recall": "boundary recall", "purity": "purity"}

Labels = NDArray[np.integer]


def overlaps(labels: Labels, mask: Labels) -> NDArray[np.int64]:
    """Pixels (regions, objects) that each region of `labels` shares with background (first) and objects of `mask`.

    Void pixels of the mask are left out.
    """
    counted = mask != VOID
    objects = int(mask[counted].max(initial=0)) + 1
    pairs = labels[counted].astype(np.int64) * objects + mask[counted]
    return np.bincount(pairs, minlength=(int(labels.max()) + 1) * objects).reshape(-1, objects)


def best_iou(overlap: NDArray[np.int64]) -> float:
    """Mean over objects of the largest IoU with a region, from `overlaps`; NaN without objects."""
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    objects = np.flatnonzero(overlap.sum(0)[1:]) + 1
    return float((overlap / np.maximum(union, 1)).max(0)[objects].mean()) if len(objects) else float("nan")


def purity(overlap: NDArray[np.int64]) -> float:
    """Share of pixels that are of the majority object (or background) of their region, from `overlaps`."""
    return float(overlap.max(1).sum() / max(overlap.sum(), 1))


def boundary_recall(labels: Labels, mask: Labels) -> float:
    """Share of the boundary of `mask` (H, W) near a boundary of `labels` (H, W); NaN without one."""
    edge = boundaries(mask)
    if not edge.any():
        return float("nan")
    reach = max(1, round(2 * max(mask.shape) / 400))
    near = F.max_pool2d(from_numpy(boundaries(labels))[None].float(), 2 * reach + 1, 1, reach)[0].numpy() > 0
    return float(near[edge].mean())


def measure(labels: Labels, mask: Labels) -> dict[str, float]:
    """All measures of one partition of one image: region of each pixel (H, W), and its mask (H, W)."""
    overlap = overlaps(labels, mask)
    return {
        "best_iou": best_iou(overlap),
        "boundary_recall": boundary_recall(labels, mask),
        "purity": purity(overlap),
        "regions": float(np.count_nonzero(overlap.sum(1))),
        "boundary": float(boundaries(labels).mean()),
    }


def slot_quality(
    model: GLNet,
    images: Source,
    preparation: Preparation,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[dict[str, dict[str, float]], int, list[Skipped]]:
    """Measures of every GLMix block of `model`, of square patches and of SLIC, as means over images.

    Args:
        model: a GLNet.
        images: with masks (H, W) as targets: 0 background, 1 and on its objects, `VOID`.
        preparation: of the model's checkpoint.
        progress: told the number done and in all, after each.

    Returns:
        Measures by 'squares', 'slic' and name of block (blocks have `entropy` too); images used; those skipped.
    """
    with needs("segment"):
        from skimage.segmentation import slic

    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    skipped: list[Skipped] = []
    for _, sample in images.each(skipped, progress):
        photo, mask = bounded(*sample[:2])
        maps = slot_maps(model, prepare_whole(photo, preparation)[None])
        rows["squares"].append(measure(square_patches(mask.shape, patch_grid(maps[-1])), mask))
        superpixels = slic(np.asarray(photo), n_segments=maps[-1].slots, compactness=10, start_label=0)
        rows["slic"].append(measure(superpixels, mask))
        for block in maps:
            labels = strongest_slots(block.assignment[0], mask.shape)
            rows[block.block].append(measure(labels, mask) | {"entropy": float(block.entropy()[0])})
    return {name: averaged(found) for name, found in rows.items()}, len(images) - len(skipped), skipped


def bounded(photo: Image.Image, mask: NDArray[np.uint8]) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Photo and mask with a longer side of `LONGEST_SIDE` at most: partitions of the mask's size are held in memory."""
    scale = LONGEST_SIDE / max(mask.shape)
    if scale >= 1:
        return photo, mask
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    smaller = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
    return photo.resize(size, Image.Resampling.LANCZOS), np.asarray(smaller)


def averaged(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over images of each measure, of those where it is defined."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        name: float(column[~np.isnan(column)].mean()) for name, column in columns.items() if not np.isnan(column).all()
    }


def plot_quality(scores: dict[str, dict[str, float]], title: str) -> Figure:
    """Each measure over depth, with square patches and SLIC as level lines."""
    blocks = [name for name in scores if name not in ("squares", "slic")]
    figure = Figure(figsize=(12, 3.6), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, (key, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        axis.plot([scores[b].get(key, np.nan) for b in blocks], marker="o", label="slots")
        for name, style in (("squares", "--"), ("slic", ":")):
            axis.axhline(
                scores[name].get(key, np.nan), color="0.4", linestyle=style, label={"slic": "SLIC"}.get(name, name)
            )
        axis.set_title(label, fontsize=9)
        axis.set_xticks(
            range(len(blocks)), [b.replace("stages.", "").replace(".blocks", "") for b in blocks], fontsize=7
        )
        axis.set_xlabel("stage.block", fontsize=8)
        axis.legend(fontsize=7)
    return figure
