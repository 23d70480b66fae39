"""What a number of slots of each image's own is worth: accuracy and time beside fixed numbers, and who gets more of them.

Each threshold of merging stands beside two fixed numbers that are its mean: a budget, to which every image's seeds are
merged, and a slot grid of about as many places. All are the same weights on the same images; none is trained anew.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from glmix.data.loading import Batch
from glmix.data.prepare import Preparation
from glmix.data.samples import Skipped, Source
from glmix.data.voc import VOID
from glmix.models import GLNet
from glmix.models.merging import counted_slots
from glmix.slots.ablation import worth
from glmix.slots.look import prepare_whole

THRESHOLDS = (0.97, 0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True)
class Setting:
    """A way to choose the number of slots: at most one of a threshold, a budget and a grid; all of them where none is given."""

    threshold: float | None = None
    budget: int | None = None
    grid: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        given = {"threshold": self.threshold, "budget": self.budget, "grid": self.grid}
        return next((kind for kind, value in given.items() if value is not None), "all slots")

    @property
    def name(self) -> str:
        if self.grid is not None:
            return "grid {} x {}".format(*self.grid)
        value = self.budget if self.threshold is None else self.threshold
        return self.kind if value is None else f"{self.kind} {value:g}"

    @contextmanager
    def applied(self, net: GLNet) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Within it `net` has it; gives the slots that images keep, as `counted_slots` does."""
        own = {name: mixer.seeds.slot_grid for name, mixer in net.slot_mixers().items()}
        try:
            if self.grid is not None:
                net.set_slot_grid(self.grid)
            net.set_slot_merging(self.threshold, self.budget)
            with counted_slots(net) as counts:
                yield counts
        finally:
            net.set_slot_merging()
            for name, mixer in net.slot_mixers().items():
                mixer.seeds.slot_grid = own[name]


def all_slots(net: GLNet) -> float:
    """Slots of a network without merging, the mean over its blocks."""
    return float(np.mean([mixer.seeds.count() for mixer in net.slot_mixers().values()]))


def nearest_grid(count: float) -> tuple[int, int]:
    """Of the grids that are square or have one column more than rows, that with the number of places nearest to `count`."""
    grids = [(rows, rows + more) for rows in range(1, 65) for more in (0, 1)]
    return min(grids, key=lambda grid: abs(grid[0] * grid[1] - count))


@dataclass
class Seen:
    """What came of a setting: whether each image (N,) was right, its slots (N,), and milliseconds an image of each batch."""

    right: list[NDArray[np.bool_]] = field(default_factory=list)
    slots: list[NDArray[np.float64]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@dataclass
class Trade:
    """A row of the table.

    Attributes:
        setting, kind: its name, and 'all slots', 'threshold', 'budget' or 'grid'.
        slots: mean over images and blocks.
        spread: standard deviation of it over images.
        top1: percent.
        difference, error: points over all slots, and the standard error, of pairs.
        ahead, ahead_error: of a fixed number: points by which the threshold of this mean is ahead of it; NaN else.
        ms: milliseconds an image, median over batches.
    """

    setting: str
    kind: str
    slots: float
    spread: float
    top1: float
    difference: float
    error: float
    ahead: float
    ahead_error: float
    ms: float


@torch.inference_mode()
def see(
    model: nn.Module, net: GLNet, settings: Sequence[Setting], batches: Iterable[Batch], progress: Callable[[int], None]
) -> tuple[list[Seen], list[Skipped]]:
    """Each batch under every setting, one after the other, so that a busy machine is so for all of them.

    On a CPU time is the processor's, of all threads over their number, which other programs hardly change.
    """
    device = next(model.parameters()).device
    alone = device.type == "cpu"
    clock, threads = (process_time, torch.get_num_threads()) if alone else (perf_counter, 1)
    found = [Seen() for _ in settings]
    skipped: list[Skipped] = []
    whole, used = all_slots(net), 0
    for batch in batches:
        skipped += batch.skipped
        if not len(batch):
            continue
        batch = batch.to(device)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        for seen, setting in zip(found, settings, strict=True):
            with setting.applied(net) as counts:
                begun = clock()
                logits: Any = model(images)
                right = (logits.argmax(1) == batch.targets).cpu().numpy()  # waits for what the device has to do
                seen.times.append(1000 * (clock() - begun) / threads / len(batch))
            grid = setting.grid
            own = np.full(len(batch), float(grid[0] * grid[1]) if grid else whole)
            if counts:
                own = np.mean([count[0].expand(len(batch)).cpu().numpy() for count in counts.values()], axis=0)
            seen.right.append(right)
            seen.slots.append(own)
        used += len(batch)
        progress(used)
    return found, skipped


def trade_off(
    model: nn.Module,
    net: GLNet,
    batches: Iterable[Batch],
    thresholds: Sequence[float] = THRESHOLDS,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Trade], int, list[Skipped]]:
    """The table: all slots, then each threshold with the fixed numbers of its mean.

    Args:
        model: a classifier in evaluation mode, of logits.
        net: the GLNet in it.
        batches: images and class indices; gone through twice, as the fixed numbers hang on what thresholds leave.
        thresholds: cosines from which seeds are merged.
        progress: told the number of images done, of both rounds together, after each batch.

    Returns:
        The rows; images used, and those skipped.
    """
    adaptive = [Setting(threshold=threshold) for threshold in thresholds]
    found, skipped = see(model, net, adaptive, batches, progress)
    if not found[0].right:
        return [], 0, skipped
    used = sum(map(len, found[0].right))
    gridded = all(mixer.seeds.slot_grid is not None for mixer in net.slot_mixers().values())
    beside: dict[Setting, list[Setting]] = {}  # fixed numbers of a threshold's mean
    for setting, seen in zip(adaptive, found, strict=True):
        mean = float(np.concatenate(seen.slots).mean())
        beside[setting] = [Setting(budget=max(1, round(mean)))] + (
            [Setting(grid=nearest_grid(mean))] if gridded else []
        )
    settings = list(dict.fromkeys([Setting(), *adaptive, *(fixed for group in beside.values() for fixed in group)]))
    again, _ = see(model, net, settings, batches, lambda done: progress(used + done))
    seen_of = dict(zip(settings, again, strict=True))
    whole = np.concatenate(seen_of[Setting()].right)
    rows = [row_of(Setting(), seen_of[Setting()], whole)]
    for setting, group in beside.items():
        rows.append(row_of(setting, seen_of[setting], whole))
        rows += [row_of(fixed, seen_of[fixed], whole, seen_of[setting]) for fixed in group]
    return rows, used, skipped


def row_of(setting: Setting, seen: Seen, whole: NDArray[np.bool_], adaptive: Seen | None = None) -> Trade:
    """A row, of images that all slots have right or wrong as in `whole`; of a fixed number, beside an `adaptive` one."""
    right, slots = np.concatenate(seen.right), np.concatenate(seen.slots)
    cost = worth(setting.name, whole, right)
    ahead, ahead_error = float("nan"), float("nan")
    if adaptive is not None:
        pair = worth("", right, np.concatenate(adaptive.right))
        ahead, ahead_error = pair.difference, pair.error
    ms = float(np.median(seen.times))
    return Trade(setting.name, setting.kind, float(slots.mean()), float(slots.std()), cost.top1, cost.difference,
                 cost.error, ahead, ahead_error, ms)  # fmt: skip


@dataclass
class Fullness:
    """Whether fuller images keep more slots, at one threshold.

    Attributes:
        threshold: of the cosine.
        slots, spread: mean over images and blocks, and the standard deviation over images.
        correlation: Spearman's, of an image's slots and the number of its objects; NaN where either is the same for all.
        blocks: the same of each block alone.
    """

    threshold: float
    slots: float
    spread: float
    correlation: float
    blocks: dict[str, float]


@torch.inference_mode()
def fullness(
    net: GLNet,
    images: Source,
    preparation: Preparation,
    thresholds: Sequence[float] = THRESHOLDS,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[list[Fullness], NDArray[np.int64], list[Skipped]]:
    """Slots that images keep, against the objects of their masks.

    Args:
        net: in evaluation mode.
        images: with masks (H, W) as targets: 0 background, 1 and on its objects, `VOID`. Seen whole, one at a time.
        preparation: of the network's checkpoint.
        thresholds: cosines from which seeds are merged.
        progress: told the number done and in all, after each.

    Returns:
        A row for each threshold; the number of objects of each image used; those skipped.
    """
    first = next(net.parameters())
    counts: list[list[list[int]]] = [[] for _ in thresholds]  # of each threshold and image, those of its blocks
    objects: list[int] = []
    skipped: list[Skipped] = []
    names = list(net.slot_mixers())
    for _, (photo, mask, _) in images.each(skipped, progress):
        image = prepare_whole(photo, preparation)[None].to(first.device, first.dtype)
        objects.append(len(set(np.unique(mask).tolist()) - {0, VOID}))
        for threshold, into in zip(thresholds, counts, strict=True):
            with Setting(threshold=threshold).applied(net) as found:
                net.forward_features(image)
            into.append([int(count[0][0]) for count in found.values()])
    rows = []
    for threshold, counted in zip(thresholds, counts if objects else (), strict=bool(objects)):
        slots = np.array(counted, float)  # (images, blocks)
        mean = slots.mean(1)
        blocks = {name: rank_correlation(of, np.array(objects)) for name, of in zip(names, slots.T, strict=True)}
        correlation = rank_correlation(mean, np.array(objects))
        rows.append(Fullness(threshold, float(mean.mean()), float(mean.std()), correlation, blocks))
    return rows, np.array(objects, np.int64), skipped


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks of values (N,) from 1; of equal ones the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]


def rank_correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Spearman's rank correlation of (N,) and (N,): Pearson's of their ranks; NaN where one does not vary."""
    first, second = ranks(one) - (len(one) + 1) / 2, ranks(other) - (len(other) + 1) / 2
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale > 0 else float("nan")


def plot_trade_off(rows: Sequence[Trade], title: str) -> Figure:
    """Accuracy over mean slots, and over time, of thresholds, budgets and grids; bars are standard errors of pairs."""
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 2, sharey=True)
    whole = rows[0]
    for axis, key, label in zip(axes, ("slots", "ms"), ("slots an image, mean", "ms an image"), strict=True):
        axis.plot([getattr(whole, key)], [whole.top1], "k*", markersize=10, label=whole.kind)
        for kind, style in {"threshold": "o-", "budget": "s--", "grid": "^:"}.items():
            own = sorted((row for row in rows if row.kind == kind), key=lambda row: getattr(row, key))
            if own:
                places = [getattr(row, key) for row in own]
                errors = [row.error for row in own]
                axis.errorbar(places, [row.top1 for row in own], errors, fmt=style, label=kind, markersize=4, capsize=2)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1, %")
    axes[0].legend()
    return figure
