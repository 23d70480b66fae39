"""Measuring a classifier."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from glmix.data.loading import Batch
from glmix.models import GLNet


class Scores(nn.Module):
    """Top-1 and top-5 accuracy in percent and mean cross-entropy, gathered batch by batch (and over processes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.loss = MeanMetric()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels), len(labels))

    def compute(self) -> dict[str, float]:
        return {
            "top1": 100 * float(self.top1.compute()),
            "top5": 100 * float(self.top5.compute()),
            "loss": float(self.loss.compute()),
        }

    def reset(self) -> None:
        for metric in (self.top1, self.top5, self.loss):
            metric.reset()


@contextmanager
def shuffled_slots(model: GLNet) -> Iterator[None]:
    """Within it every pixel receives another slot's content: attended slots are rolled by half before dispatching.

    The assignment stays as it is, so what accuracy loses is what the content of the slots was worth.
    """
    mixers = model.slot_mixers().values()

    def rolled(attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda slots_BMC: attend(slots_BMC).roll(slots_BMC.shape[1] // 2, 1)

    for mixer in mixers:
        mixer.attend = rolled(mixer.attend)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.attend


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], classes: int, device: torch.device
) -> tuple[dict[str, float], list[str]]:
    """Scores of `model` and the files that were skipped, with reasons.

    Returns:
        `top1` and `top5` in percent, `loss` (mean cross-entropy), `images` (number used); and the skipped.
    """
    scores = Scores(classes).to(device)
    model = model.eval().to(device).to(memory_format=torch.channels_last)
    used, skipped = 0, []
    for batch in batches:
        skipped += batch.skipped
        if len(batch.labels):
            batch = batch.to(device)
            scores.update(model(batch.images.contiguous(memory_format=torch.channels_last)).float(), batch.labels)
            used += len(batch.labels)
    return (scores.compute() if used else {"top1": 0.0, "top5": 0.0, "loss": float("nan")}) | {"images": used}, skipped
