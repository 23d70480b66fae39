"""What the parts of a trained network are worth to it: each is switched off or disturbed, and the same images seen again.

This is what a network leans on, not what it gains: one trained without that part may be as good. Which of both is asked
for, `glmix study` tells by training.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from glmix.data.loading import Batch
from glmix.data.samples import Skipped
from glmix.models import GLNet
from glmix.models.glnet import GLMix
from glmix.models.slots import FAR, cluster, fixed_patches, hardened

Change = Callable[[GLMix], Callable[[], None]]  # disturbs a mixer; gives what puts it back


@dataclass(frozen=True)
class Row:
    """One disturbance of a network: `change` of each of `mixers`."""

    name: str
    mixers: list[GLMix]
    change: Change

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the network is disturbed."""
        with ExitStack() as stack:
            for mixer in self.mixers:
                stack.callback(self.change(mixer))
            yield


def replaced(part: nn.Module, method: str, new: Callable[..., Any]) -> Callable[[], None]:
    """Let `new` stand for a method of a module, which its class goes on to have."""
    setattr(part, method, new)
    return lambda: delattr(part, method)


def without_global(mixer: GLMix) -> Callable[[], None]:
    return replaced(mixer, "globally", lambda normed, entering: torch.zeros_like(normed))


def without_local(mixer: GLMix) -> Callable[[], None]:
    return replaced(mixer.local, "forward", torch.zeros_like)


def contents(change: Callable[[Tensor], Tensor]) -> Change:
    """Slots (B, M, C) that are changed between their attention and dispatching."""

    def apply(mixer: GLMix) -> Callable[[], None]:
        attend = mixer.attend
        return replaced(mixer, "attend", lambda slots_BMC: change(attend(slots_BMC)))

    return apply


def permuted(slots_BMC: Tensor) -> Tensor:
    """Each image's slots in an order drawn for it; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    order_BM = torch.rand(slots_BMC.shape[:2], generator=generator).argsort(1).to(slots_BMC.device)
    return slots_BMC.take_along_dim(order_BM[:, :, None], 1)


def averaged(slots_BMC: Tensor) -> Tensor:
    """The mean of each image's slots, for every slot."""
    return slots_BMC.mean(1, keepdim=True).expand_as(slots_BMC)


def rolled(slots_BMC: Tensor) -> Tensor:
    """Every slot gets the content of the one half of all further, so that none keeps its own."""
    return slots_BMC.roll(slots_BMC.shape[1] // 2, 1)


def all_or_nothing(mixer: GLMix) -> Callable[[], None]:
    """Each place belongs to its most similar slot alone."""
    return mixer.similarity.register_forward_hook(lambda _m, _a, logits_BMN: hardened(logits_BMN)).remove


def in_squares(logits: Callable[[Tensor, tuple[int, int]], Tensor]) -> Change:
    """An assignment by place, the same for every image."""

    def apply(mixer: GLMix) -> Callable[[], None]:
        def gather(normed_BHWC: Tensor, entering_BHWC: Tensor) -> tuple[Tensor, Tensor]:
            logits_BMN = logits(normed_BHWC, mixer.seeds.slot_grid)  # type: ignore[arg-type]
            return logits_BMN, mixer.attend(cluster(logits_BMN, normed_BHWC.flatten(1, 2)))

        return replaced(mixer, "gather", gather)

    return apply


def hard_squares(x_BHWC: Tensor, slot_grid: tuple[int, int]) -> Tensor:
    """Logits (B, M, N): 0 for the square of the slot grid that a place lies in, else `FAR`."""
    patches_BMM, places_BNM = fixed_patches(x_BHWC, slot_grid)
    return FAR * (1 - patches_BMM @ places_BNM.transpose(1, 2))


def soft_squares(x_BHWC: Tensor, slot_grid: tuple[int, int]) -> Tensor:
    """Logits (B, M, N) of bilinear weights among the squares' centres: a place between two belongs to both."""
    B, H, W, _ = x_BHWC.shape
    rows, columns = (
        tents(size, cells, x_BHWC.device).to(x_BHWC.dtype) for size, cells in zip((H, W), slot_grid, strict=True)
    )
    weights_MN = torch.einsum("ih,jw->ijhw", rows, columns).reshape(slot_grid[0] * slot_grid[1], H * W)
    return weights_MN.log().clamp(min=FAR).expand(B, -1, -1)


def tents(size: int, cells: int, device: torch.device) -> Tensor:
    """Weights (cells, size) of linear interpolation among the centres of cells; beyond the outermost it is theirs."""
    at = ((torch.arange(size, device=device) + 0.5) * cells / size - 0.5).clamp(0, cells - 1)
    return (1 - (at - torch.arange(cells, device=device)[:, None]).abs()).clamp(min=0)


def rows_of(net: GLNet) -> list[Row]:
    """The rows of the table, of a network as it is built.

    Squares are left out where slots do not lie on a grid, local branches where there are none.
    """
    mixers = net.slot_mixers()
    every = list(mixers.values())
    stages: dict[int, list[GLMix]] = {}
    for name, mixer in mixers.items():
        stages.setdefault(int(name.split(".")[1]) + 1, []).append(mixer)
    rows = [Row(f"global off: {name}", [mixer], without_global) for name, mixer in mixers.items()]
    rows += [Row(f"global off: stage {stage}", own, without_global) for stage, own in stages.items()]
    if len(stages) > 2:
        first = list(stages)[:-1]
        together = [mixer for stage in first for mixer in stages[stage]]
        rows.append(Row(f"global off: stages {', '.join(map(str, first))}", together, without_global))
    rows.append(Row("global off: all", every, without_global))
    # those of stages without slots too
    local = [part for part in net.modules() if isinstance(part, GLMix) and part.integration != "global"]
    if local:
        rows.append(Row("local off: all", local, without_local))
    for name, change in {"permuted": permuted, "the image's mean": averaged, "rolled": rolled}.items():
        rows.append(Row(f"contents: {name}", every, contents(change)))
    rows.append(Row("assignment: hard", every, all_or_nothing))
    if all(mixer.seeds.slot_grid is not None for mixer in every):
        rows.append(Row("assignment: squares, hard", every, in_squares(hard_squares)))
        rows.append(Row("assignment: squares, soft", every, in_squares(soft_squares)))
    return rows


@dataclass
class Worth:
    """What a disturbance costs, on the same images.

    Attributes:
        row: its name.
        top1: of the disturbed network, percent.
        difference: to the undisturbed one, points.
        error: standard error of the difference, points; of pairs, image by image.
        lost: images that only the undisturbed network has right.
        gained: images that only the disturbed one has right.
    """

    row: str
    top1: float
    difference: float
    error: float
    lost: int
    gained: int


def worth(row: str, whole: NDArray[np.bool_], disturbed: NDArray[np.bool_]) -> Worth:
    """Of which images (N,) the network has right as it is, and disturbed."""
    apart = 100.0 * (disturbed.astype(float) - whole)
    return Worth(
        row,
        100 * float(disturbed.mean()),
        float(apart.mean()),
        float(apart.std()) / len(apart) ** 0.5,
        int((whole & ~disturbed).sum()),
        int((disturbed & ~whole).sum()),
    )


@torch.inference_mode()
def ablate(
    model: nn.Module, net: GLNet, batches: Iterable[Batch], progress: Callable[[int], None] = lambda done: None
) -> tuple[float, list[Worth], int, list[Skipped]]:
    """Every row of `rows_of(net)`, on images that are read once: each batch goes through all rows.

    Args:
        model: a classifier in evaluation mode, of logits.
        net: the GLNet in it.
        batches: images and class indices.
        progress: told the number of images done, after each batch.

    Returns:
        Top-1 of the network as it is, in percent; what each row costs; images used, and those skipped.
    """
    rows = rows_of(net)
    device = next(model.parameters()).device
    right: list[list[NDArray[np.bool_]]] = [[] for _ in range(1 + len(rows))]
    skipped: list[Skipped] = []
    used = 0

    def answered(batch: Batch) -> NDArray[np.bool_]:
        logits: Any = model(batch.images.contiguous(memory_format=torch.channels_last))
        return (logits.argmax(1) == batch.targets).cpu().numpy()

    for batch in batches:
        skipped += batch.skipped
        if not len(batch):
            continue
        batch = batch.to(device)
        right[0].append(answered(batch))
        for found, row in zip(right[1:], rows, strict=True):
            with row.applied():
                found.append(answered(batch))
        used += len(batch)
        progress(used)
    if not used:
        return float("nan"), [], 0, skipped
    whole, *disturbed = (np.concatenate(found) for found in right)
    costs = [worth(row.name, whole, found) for row, found in zip(rows, disturbed, strict=True)]
    return 100 * float(whole.mean()), costs, used, skipped


def plot_ablation(costs: list[Worth], title: str) -> Figure:
    """The difference of each row, with two standard errors to both sides."""
    figure = Figure(figsize=(7, 1 + 0.24 * len(costs)), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.barh(
        [cost.row for cost in costs],
        [cost.difference for cost in costs],
        xerr=[2 * cost.error for cost in costs],
        color="C0",
        ecolor="0.3",
        capsize=2,
    )
    axis.invert_yaxis()
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_xlabel("top-1, points over the network as it is (± 2 standard errors)")
    axis.set_title(title, fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    return figure
