"""Slots that adapt: seeds that are alike are merged before similarities are taken, so that each image has its own count.

Only the direction of a seed counts, as similarities are cosines. Merged seeds are carried with their size s, and

- clustering takes the merged seed as it is: equal seeds would have gathered equal slots;
- attention among slots adds log s to the logits of a key, which stands for s equal ones;
- dispatching adds log s to a slot's similarities, for the same reason.

So nothing changes where merged seeds had the same direction. Images of a batch keep different numbers of seeds: what is
beyond an image's own has the log size `FAR`, whose softmax is 0, and is nobody's.

Tensors: `seeds_BMC` before, `seeds_BKC` and `log_size_BK` after, K the most that an image of the batch has left.
"""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from glmix.models.slots import FAR, unit_rows

AUTO = 0.9  # threshold: less than half of the slots for next to no accuracy, by measurement (docs/adaptive.md)
ROUNDING = 1e-6  # of the cosine of two seeds of one direction


def _in_full(device: str) -> contextlib.AbstractContextManager[Any]:
    """Without autocast, which would take cosines in half precision: nothing would be told from 1 then."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _cosines(sums_BMC: Tensor) -> Tensor:
    """Cosines (B, M, M) of each pair's directions, the same in both orders, and -2 of a seed with itself."""
    unit_BMC = unit_rows(sums_BMC)
    cosines_BMM = torch.matmul(unit_BMC, unit_BMC.transpose(1, 2))
    own = torch.eye(sums_BMC.shape[1], dtype=torch.bool, device=sums_BMC.device)
    return ((cosines_BMM + cosines_BMM.transpose(1, 2)) / 2).masked_fill(own, -2.0)


@register_notrace_function
def merge_alike(seeds_BMC: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Seeds merged until no two of an image have a cosine of `threshold` or more.

    In rounds, of which a few are enough: of seeds that are alike the one leads that has most around it, in cosines beyond the
    threshold, and whoever is like a leader joins the most alike one. What is merged hangs neither on the other images nor,
    but for ties, on the order of seeds.

    Returns:
        Seeds (B, K, C), sums of unit vectors (float32 at least), in the order of their leaders; log sizes (B, K).
    """
    with _in_full(seeds_BMC.device.type):
        sums_BKC = unit_rows(seeds_BMC)
        sizes_BK = torch.ones_like(sums_BKC[:, :, 0])
        while True:
            here_BK = sizes_BK > 0
            cosines_BKK = _cosines(sums_BKC)
            alike_BKK = (cosines_BKK >= threshold - ROUNDING) & here_BK.unsqueeze(1) & here_BK.unsqueeze(2)
            if not bool(alike_BKK.any()):
                break
            place_K = torch.arange(sums_BKC.shape[1], device=sums_BKC.device)
            around_BK = (cosines_BKK * alike_BKK).sum(2)
            more_BKK = around_BK.unsqueeze(1) > around_BK.unsqueeze(2)
            ahead_BKK = more_BKK | (~more_BKK.transpose(1, 2) & (place_K < place_K.unsqueeze(1)))  # a tie: the first
            leads_BK = ~(alike_BKK & ahead_BKK).any(2)
            leader_BKK = alike_BKK & leads_BK.unsqueeze(1)
            joins_BK = leader_BKK.any(2)
            nearest_BK = cosines_BKK.masked_fill(~leader_BKK, -2.0).argmax(2)
            sums_BKC, sizes_BK = _joined(
                torch.where(joins_BK, nearest_BK, place_K), here_BK & ~joins_BK, sums_BKC, sizes_BK
            )
        return sums_BKC, sizes_BK.clamp(min=1).log().masked_fill(sizes_BK == 0, FAR)


def _joined(root_BK: Tensor, stays_BK: Tensor, sums_BKC: Tensor, sizes_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and sizes of those that stay, with those that join them; as many as the fullest image keeps, 0 beyond."""
    most = int(stays_BK.sum(1).max())
    left_BL = stays_BK.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    parts_BLK = (root_BK.unsqueeze(1) == left_BL.unsqueeze(2)) & stays_BK.gather(1, left_BL).unsqueeze(2)
    parts_BLK = parts_BLK.to(sums_BKC.dtype)
    return torch.matmul(parts_BLK, sums_BKC), torch.matmul(parts_BLK, sizes_BK.unsqueeze(2)).squeeze(2)


@register_notrace_function
def merge_to(seeds_BMC: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Seeds of every image merged until `budget` are left, or as they are where there are no more.

    In rounds of fixed number and size, so that it can be exported: each seed points at the most alike one before it, and
    the quarter that points at the most alike ones joins them, chains as a whole. Equal seeds come first.

    Returns:
        Seeds (B, K, C), sums of unit vectors (float32 at least), and log sizes (B, K).
    """
    with _in_full(seeds_BMC.device.type):
        sums_BKC = unit_rows(seeds_BMC)
        sizes_BK = torch.ones_like(sums_BKC[:, :, 0])
        count = seeds_BMC.shape[1]
        while count > budget:
            fewer = min(count - budget, max(count // 4, 1))
            place_K = torch.arange(count, device=sums_BKC.device)
            later_KK = place_K.unsqueeze(1) <= place_K
            best_BK, before_BK = _cosines(sums_BKC).masked_fill(later_KK, -3.0).max(2)
            chosen_BF = best_BK.topk(fewer, 1).indices
            joins_BK = (chosen_BF.unsqueeze(2) == place_K).to(torch.int64).sum(1)
            root_BK = torch.where(joins_BK > 0, before_BK, place_K)
            for _ in range(fewer.bit_length()):  # chains of pointers, each time half as long
                root_BK = root_BK.gather(1, root_BK)
            left_BL = (joins_BK * count + place_K).topk(count - fewer, 1, largest=False).indices
            parts_BLK = (root_BK.unsqueeze(1) == left_BL.unsqueeze(2)).to(sums_BKC.dtype)
            sums_BKC = torch.matmul(parts_BLK, sums_BKC)
            sizes_BK = torch.matmul(parts_BLK, sizes_BK.unsqueeze(2)).squeeze(2)
            count -= fewer
        return sums_BKC, sizes_BK.log()


for _name in ("merge_alike", "merge_to"):
    torch.fx.wrap(_name)


def checked_threshold(threshold: Any) -> float:
    """Raise a ValueError if a threshold of cosines is not within 0 and 1."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"a threshold is between 0 and 1, not {threshold}")
    return float(threshold)


def checked_budget(budget: Any) -> int:
    """Raise a ValueError if there is no such number of slots."""
    if operator.index(budget) < 1:
        raise ValueError(f"at least 1 slot an image, not {budget}")
    return operator.index(budget)


class SeedMerging(nn.Module):
    """Seeds (B, M, C) to fewer (B, K, C) and their log sizes (B, K); `glmix.slot_maps` listens here.

    Args:
        threshold: cosine from which seeds are merged; each image has its own number of slots then.
        budget: instead, the number of slots that every image keeps.

    Raises:
        ValueError: both or none, or one that cannot be.
    """

    def __init__(self, threshold: float | None = None, budget: int | None = None) -> None:
        super().__init__()
        if (threshold is None) == (budget is None):
            raise ValueError("slots are merged by a threshold or to a budget, one of both")
        self.threshold = None if threshold is None else checked_threshold(threshold)
        self.budget = None if budget is None else checked_budget(budget)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}" if self.budget is None else f"budget={self.budget}"

    @torch.jit.unused  # a scripted network that merges says so when it is run
    def forward(self, seeds_BMC: Tensor) -> tuple[Tensor, Tensor]:
        if self.budget is not None:
            return merge_to(seeds_BMC, self.budget)
        assert self.threshold is not None
        return merge_alike(seeds_BMC, self.threshold)


def kept(log_size_BK: Tensor) -> Tensor:
    """Which slots (B, K) are an image's own, and not there for the fullest image of the batch alone."""
    return log_size_BK >= 0


@contextlib.contextmanager
def counted_slots(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within it, slots (B,) that the images of each forward pass kept, by the names of the modules that merge."""
    counts: dict[str, list[Tensor]] = {}
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, SeedMerging):
                counts[name] = []

                def count(_m: nn.Module, _a: Any, output: tuple[Tensor, Tensor], to: list = counts[name]) -> None:
                    to.append(kept(output[1]).sum(1))

                stack.callback(module.register_forward_hook(count).remove)
        yield counts
