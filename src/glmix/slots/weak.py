"""Masks from image labels: class maps become masks, and how good those are with and without slots.

The measure is that of IRN (Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel
Relations", 2019): which classes an image has is given; maps are the mean over sizes and mirror images, each scaled to 1 at
its highest place; a place is of the class whose map is highest there, or background where none is above a threshold; and mean
IoU is of the pixels of all images together.

What a way of spreading leaves open (blocks, steps, mixing, threshold) is chosen on one half of the images, and its figures
are of the other.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from glmix.data.masks import IGNORED
from glmix.data.prepare import Preparation
from glmix.data.samples import Skipped, Source
from glmix.errors import needs
from glmix.models import GLNet
from glmix.models.slot_maps import slot_maps
from glmix.slots.class_maps import SCALES, MapKind, highest_one, mean_maps
from glmix.slots.look import prepare_whole
from glmix.slots.quality import bounded
from glmix.slots.regions import patch_grid, square_patches
from glmix.slots.spread import Way, kmeans_maps, logits_of, logits_of_parts, spread_by

THRESHOLDS = np.arange(1, 40) / 40  # shares of a map's highest value
FIXED = 0.15  # IRN's
STEPS_AND_MIXES = ((1, 1.0), (1, 0.5), (2, 1.0), (4, 1.0))
DRAWS = 2000  # of the bootstrap
PLAIN, SLOTS, UNTRAINED, KMEANS, SQUARES, SLIC = "plain map", "slots", "untrained", "k-means", "squares", "SLIC"

Counts = NDArray[np.int64]  # (..., 3, classes): pixels that are right, found and there


@dataclass(frozen=True)
class Seer:
    """What is needed to see classes in photos.

    Attributes:
        model: a GLNet in evaluation mode.
        preparation: of its images.
        classifier: a linear layer of its pooled features.
        kind, scales, flip: see `mean_maps`.
    """

    model: GLNet
    preparation: Preparation
    classifier: nn.Linear
    kind: MapKind = "gradient"
    scales: Sequence[float] = SCALES
    flip: bool = True

    def maps(self, photo: Image.Image, classes: Sequence[int]) -> Tensor:
        """As `mean_maps`."""
        return mean_maps(
            self.model, photo, self.preparation, self.classifier, classes, self.kind, self.scales, self.flip
        )

    def slots(self, photo: Image.Image) -> dict[str, Tensor]:
        """Logits (M, h, w) of every block for the whole photo."""
        return logits_of(slot_maps(self.model, prepare_whole(photo, self.preparation)[None]))


def scores_at(maps_Khw: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    """Maps at `size` (K, H, W), from 0 at the lowest place of each to 1 at its highest.

    A plain map is next to nothing somewhere; one that went through slots is so nowhere, since each place has a little of
    every slot. Without the lowest taken off, no threshold would suit both.
    """
    lifted_Khw = maps_Khw - maps_Khw.amin((1, 2), keepdim=True)
    return F.interpolate(highest_one(lifted_Khw)[None], size, mode="bilinear", align_corners=False)[0].numpy()


def mask_of(scores_KHW: NDArray[np.float32], classes: Sequence[int], threshold: float) -> NDArray[np.uint8]:
    """The class (H, W) whose score is highest at each place, 0 where none is above the threshold.

    Args:
        scores_KHW: of each class, from 0 to 1.
        classes: the numbers that they have in the mask, above 0.
    """
    if not len(classes):
        return np.zeros(scores_KHW.shape[1:], np.uint8)
    best = np.asarray(classes, np.uint8)[scores_KHW.argmax(0)]
    return np.where(scores_KHW.max(0) > threshold, best, 0).astype(np.uint8)


def count_pixels(
    scores_KHW: NDArray[np.float32], classes: Sequence[int], truth: NDArray[np.uint8], of: int
) -> NDArray[np.int64]:
    """Pixels (thresholds, 3, of) that are right, found and there, of each class, by `mask_of` at each of `THRESHOLDS`.

    Args:
        truth: (H, W) numbers of classes; `IGNORED` ones count for nothing.
        of: number of classes with the background, which is the first.
    """
    known = truth != IGNORED
    wanted = truth[known].astype(np.int64)
    there = np.bincount(wanted, minlength=of)[:of]
    found, right = np.zeros((len(THRESHOLDS), of), np.int64), np.zeros((len(THRESHOLDS), of), np.int64)
    if len(classes):
        best = scores_KHW.max(0)[known]
        taken = np.asarray(classes, np.int64)[scores_KHW.argmax(0)[known]]
        level = np.searchsorted(THRESHOLDS, best)  # of so many thresholds it is above
        found[:] = _above(level * of + taken, of)
        same = taken == wanted
        right[:] = _above((level * of + taken)[same], of)
    found[:, 0] = len(wanted) - found[:, 1:].sum(1)
    missed = wanted == 0
    right[:, 0] = missed.sum() - (_above(level[missed], 1)[:, 0] if len(classes) else 0)
    return np.stack([right, found, np.broadcast_to(there, found.shape)], 1)


def _above(places: NDArray[np.int64], of: int) -> NDArray[np.int64]:
    """How many pixels of each class are above each threshold, (thresholds, of), from level times `of` plus class."""
    levels = np.bincount(places, minlength=(len(THRESHOLDS) + 1) * of).reshape(-1, of)
    return levels[::-1].cumsum(0)[::-1][1:]


def class_iou(counts: Counts) -> NDArray[np.float64]:
    """In percent (..., classes), from counts (..., 3, classes) summed over images; NaN of a class neither there nor found."""
    right, found, there = np.moveaxis(counts, -2, 0)
    union = found + there - right
    return np.where(union > 0, 100 * right / np.maximum(union, 1), np.nan)


def mean_iou(counts: Counts) -> NDArray[np.float64]:
    """In percent, from counts (..., 3, classes) summed over images; of the classes that are there or found."""
    return np.nanmean(class_iou(counts), -1)


def ways_of(blocks: Sequence[str]) -> list[Way]:
    """What is tried: each block, by steps and mixing; and the first blocks of two or three stages, the deepest first."""
    single = [Way((name,), steps, mix) for name in blocks for steps, mix in STEPS_AND_MIXES]
    firsts: dict[str, str] = {}
    for name in blocks:
        firsts.setdefault(name.rpartition(".blocks")[0], name)
    deepest_first = list(reversed(firsts.values()))
    chains = [chosen for count in range(2, len(firsts) + 1) for chosen in combinations(deepest_first, count)]
    return single + [Way(chain) for chain in chains]


@dataclass
class Row:
    """A way to make masks, in figures; mean IoU in percent.

    Attributes:
        name: what the maps are spread by.
        way: how; chosen on the one half.
        threshold: of the background; chosen there too.
        miou: on the other half.
        fixed: at the threshold `FIXED`.
        best: at the threshold that is best on that other half itself, which flatters it.
        gain, low, high: `miou` less the plain map's, and the 95 % interval of that, by a bootstrap over images in pairs.
        curve: at each of `THRESHOLDS`, on the other half.
        classes: IoU of each class, in percent; not a number where it is neither there nor found.
    """

    name: str
    way: Way
    threshold: float
    miou: float
    fixed: float
    best: float
    gain: float = 0.0
    low: float = 0.0
    high: float = 0.0
    curve: list[float] = field(default_factory=list)
    classes: list[float] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain data; what is not a number is None."""
        known = [None if value != value else value for value in self.classes]
        interval = {name: None for name in ("low", "high") if self.low != self.low}
        return asdict(self) | {"way": asdict(self.way), "classes": known} | interval


@dataclass
class Measured:
    """What `measure_weakly` found.

    Attributes:
        rows: the plain map first.
        gains: (n,) of each image of the reported half, the mean IoU of its own pixels through slots less the plain map's.
        reported: (n,) their numbers in the source.
        chosen_on: number of images that ways were chosen on.
        skipped: those that could not be read.
    """

    rows: list[Row]
    gains: NDArray[np.float64]
    reported: list[int]
    chosen_on: int
    skipped: list[Skipped]


def measure_weakly(
    seer: Seer,
    images: Source,
    rows_of_classes: dict[int, int],
    untrained: GLNet | None = None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Measured:
    """mIoU of masks from image labels, plain and spread in several ways.

    Args:
        seer: model and classifier.
        images: with maps of classes (H, W), of which 0 is the background.
        rows_of_classes: the classifier's row of each class number of the maps; classes without one are never found.
        untrained: the same network before training, whose slots are tried too.
        progress: told the number done and in all, after each.

    Raises:
        ValueError: fewer than 2 images can be read.
    """
    of = len(images.classes)
    counted: dict[tuple[str, Way], list[Counts]] = {}
    used: list[int] = []
    skipped: list[Skipped] = []
    for index, sample in images.each(skipped, progress):
        photo, truth = bounded(*sample[:2])
        classes = classes_there(truth, rows_of_classes)
        for key, scores in all_scores(seer, photo, truth.shape, [rows_of_classes[c] for c in classes], untrained):
            counted.setdefault(key, []).append(count_pixels(scores, classes, truth, of).astype(np.int32))
        used.append(index)
    if len(used) < 2:
        raise ValueError(f"{len(used)} images that can be read; at least 2 are needed, to choose on and to report")
    counts = {key: np.stack(found) for key, found in counted.items()}  # (images, thresholds, 3, classes)
    rows: list[Row] = []
    own: dict[str, Counts] = {}
    plain = counts[PLAIN, Way()]
    for name, ways in _families(counts).items():
        row, chosen = _chosen(name, {way: counts[_family(name), way] for way in ways})
        base = own.setdefault(PLAIN, chosen)
        row.gain, row.low, row.high = paired_interval(base, chosen)
        rows.append(row)
        own[name] = chosen
    gains = mean_iou(own[SLOTS]) - mean_iou(own[PLAIN])
    return Measured(rows, gains, used[1::2], len(plain[0::2]), skipped)


def classes_there(truth: NDArray[np.uint8], known: dict[int, int]) -> list[int]:
    """The image labels: numbers of the classes in its map that are `known`, but for the background."""
    return [int(c) for c in np.unique(truth) if c in known and c not in (0, IGNORED)]


def all_scores(
    seer: Seer,
    photo: Image.Image,
    size: tuple[int, ...],
    rows: Sequence[int],
    untrained: GLNet | None = None,
    only: Container[tuple[str, Way]] | None = None,
) -> Iterator[tuple[tuple[str, Way], NDArray[np.float32]]]:
    """Scores (K, H, W) of the classifier's `rows` at `size` (H, W), by what maps are spread by, and how; `only` these."""
    height, width = size
    maps = seer.maps(photo, rows) if rows else None  # an image of background alone has no labels
    nothing = np.zeros((0, height, width), np.float32)
    tensor = prepare_whole(photo, seer.preparation)[None]
    found = slot_maps(seer.model, tensor)
    seen = Image.fromarray(np.asarray(photo)).resize((tensor.shape[3], tensor.shape[2]))
    with needs("segment"):
        from skimage.segmentation import slic
    ways = ways_of([m.block for m in found])
    once = [way for way in ways if way.steps == 1 and len(way.path) == 1]  # a partition's means stay as they are
    parts = {
        SQUARES: square_patches((tensor.shape[2], tensor.shape[3]), patch_grid(found[-1])),
        SLIC: slic(np.asarray(seen), n_segments=found[-1].slots, compactness=10, start_label=0),
    }
    tried: dict[str, tuple[dict[str, Tensor], list[Way]]] = {PLAIN: ({}, [Way()]), SLOTS: (logits_of(found), ways)}
    tried[KMEANS] = logits_of(kmeans_maps(seer.model, tensor)), once
    if untrained is not None:
        tried[UNTRAINED] = (logits_of(slot_maps(untrained, tensor)), ways)
    for name, partition in parts.items():
        tried[name] = ({name: logits_of_parts(partition)}, [Way((name,), 1, mix) for mix in (1.0, 0.5)])
    for name, (blocks, among) in tried.items():
        for way in among:
            if only is None or (name, way) in only:
                yield (name, way), nothing if maps is None else scores_at(spread_by(maps, blocks, way), (height, width))


def _family(name: str) -> str:
    """What the row `name` is spread by: rows of single blocks are of slots."""
    return name if name in (PLAIN, UNTRAINED, KMEANS, SQUARES, SLIC) else SLOTS


def _families(counts: dict[tuple[str, Way], Counts]) -> dict[str, list[Way]]:
    """The ways among which each row chooses: all that it is spread by; and of slots also each block by itself, and chains."""
    rows: dict[str, list[Way]] = {PLAIN: [], SLOTS: []}
    for family, way in counts:
        if family == SLOTS:
            rows[SLOTS].append(way)
            rows.setdefault(way.path[0] if len(way.path) == 1 else "in sequence", []).append(way)
    for family, way in counts:
        if family != SLOTS:
            rows.setdefault(family, []).append(way)
    return rows


def _chosen(name: str, tried: dict[Way, Counts]) -> tuple[Row, Counts]:
    """The row of the way and threshold that are best on every second image, and its counts (n, 3, classes) on the others."""
    curves = {way: mean_iou(counts[0::2].sum(0)) for way, counts in tried.items()}
    way = max(curves, key=lambda one: curves[one].max())
    level = int(curves[way].argmax())
    other = tried[way][1::2]
    curve = mean_iou(other.sum(0))
    fixed = float(curve[np.flatnonzero(THRESHOLDS == FIXED)[0]])
    row = Row(name, way, float(THRESHOLDS[level]), float(curve[level]), fixed, float(curve.max()))
    row.curve, row.classes = curve.tolist(), class_iou(other[:, level].sum(0)).tolist()
    return row, other[:, level]


def paired_interval(base: Counts, other: Counts, draws: int = DRAWS) -> tuple[float, float, float]:
    """Difference in mIoU of `other` to `base`, counts (images, 3, classes) of the same images, and its 95 % interval.

    Images are drawn with replacement, the same ones for both, and the percentiles taken (Efron's bootstrap). Of one image
    they say nothing: not a number.
    """
    images = len(base)
    difference = float(mean_iou(other.sum(0)) - mean_iou(base.sum(0)))
    if images < 2:
        return difference, float("nan"), float("nan")
    rng = np.random.default_rng(0)
    times = rng.multinomial(images, np.full(images, 1 / images), draws)  # (draws, images)
    drawn = [
        mean_iou((times @ counts.reshape(images, -1).astype(np.int64)).reshape(draws, *counts.shape[1:]))
        for counts in (base, other)
    ]
    low, high = np.percentile(drawn[1] - drawn[0], [2.5, 97.5])
    return difference, float(low), float(high)
