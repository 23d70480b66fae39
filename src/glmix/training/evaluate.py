"""Measuring a model on a task's data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glmix.data.loading import Batch
from glmix.data.samples import Skipped
from glmix.models import backbone_of
from glmix.training.processes import gathered
from glmix.training.task import Task


@torch.inference_mode()
def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Batch], metrics: Any, device: torch.device
) -> tuple[dict[str, float], int, list[Skipped]]:
    """Figures of `model`, the number of images they are of, and the images that could not be used; of all processes."""
    metrics = metrics.to(device)
    model = model.eval().to(device).to(memory_format=torch.channels_last)
    used = 0
    skipped: list[Skipped] = []
    for batch in batches:
        skipped += batch.skipped
        if len(batch):
            batch = batch.to(device)
            metrics.update(task.forward(model, batch), batch.targets)
            used += len(batch)
    used, skipped = sum(gathered(used)), [found for part in gathered(skipped) for found in part]
    return (metrics.compute() if used else {}), used, skipped


@contextmanager
def shuffled_slots(model: nn.Module) -> Iterator[None]:
    """Within it every pixel receives another slot's content: attended slots are rolled by half before dispatching.

    The assignment stays as it is, so what accuracy loses is what the content of the slots was worth.
    """
    mixers = backbone_of(model).slot_mixers().values()

    def rolled(attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda slots_BMC: attend(slots_BMC).roll(slots_BMC.shape[1] // 2, 1)

    for mixer in mixers:
        mixer.attend = rolled(mixer.attend)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.attend
