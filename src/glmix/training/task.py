"""What a task is: one record, which the run, evaluation and prediction ask for all that differs between tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from glmix.data.check import Checked
from glmix.data.loading import Batch, Item, Transform
from glmix.data.prepare import Preparation
from glmix.data.samples import DataSet, Source
from glmix.models.description import Description
from glmix.training.options import TrainOptions

BOX = ("x", "y", "width", "height")  # columns of a box, in pixels of the picture


class Loss(Protocol):
    """The loss of one batch (a scalar); everything random in it hangs on the generators as they stand."""

    def __call__(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor: ...


class Metrics(Protocol):
    """Gathers outputs and targets batch by batch, over processes too, and tells figures by name.

    It may have `details()`, to be asked after `compute`: figures of each class under `classes`, and under `worst` the
    images that went worst, as rows of plain data.
    """

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]: ...

    def reset(self) -> None: ...

    def to(self, device: torch.device) -> Any: ...


def percentages(scores: dict[str, float]) -> str:
    """All figures in words: percentages to two places, a loss to four."""
    words = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "macc": "mAcc", "aacc": "aAcc"}
    return ", ".join(
        f"{name} {value:.4f}" if name == "loss" else f"{words.get(name, name)} {value:.2f} %"
        for name, value in scores.items()
    )


def of_images(model: nn.Module, batch: Batch) -> Any:
    """Outputs of a model that asks for images alone; channels last in memory, which is faster."""
    return model(batch.images.contiguous(memory_format=torch.channels_last))


@dataclass(frozen=True)
class Task:
    """One task. A new one is a module with such a record, and a line in `glmix.tasks`.

    Attributes:
        name: as in `--task` and in checkpoints.
        about: in a few words, for `--help`.
        options: its schema, `TrainOptions` and what it adds.
        open: all of the data, by its name.
        build: the model of a description, with weights as first drawn; further options of the architecture win.
        start: what `options` ask of a freshly built model: weights to start from, parts that do not learn. Returns what
            there is to say of it.
        prepare: how validation images are prepared; kept in the checkpoint.
        training: the source and the transform of training samples.
        evaluation: the transform of samples to evaluate on.
        align: a source with its targets in the order of the model's classes.
        collate: samples to a batch.
        loss: of a run.
        metrics: of the outputs of a model in evaluation mode. Where they have `details()`, `eval` tells these too:
            `classes`, figures by name of each, and `worst`, rows of the images that went worst.
        headline: the figure that chooses the best weights; the larger, the better.
        curves: the figures that a run's picture shows, where all would be too many.
        show: the figures of a validation in a few words.
        decode: answers for each image of a batch, of the model's outputs for it, at most so many: plain data, as JSON
            has it.
        tell: the answers for an image, in words.
        usual_top: answers of an image where nobody says how many.
        collect: the answers for many pictures (`image`, `size`, `predictions` of each) as one JSON file has them.
        columns: what a table of answers has of each, beside the image's path and the answer's rank: names and types
            (str, int, float). By one name in all tasks: `label`, `name`, `probability`; `x`, `y`, `width`, `height` of a
            box in pixels; `mask`, COCO's run lengths as JSON; `share` of the picture.
        rows: the answers for an image as rows of these, the best first.
        forward: the outputs of a model in evaluation mode for a batch, whose targets are of no account.
        draw: pictures of what was found in one, of the outputs for it, by what their files' names end in; where there is
            something to see.
        describe: all figures of an evaluation in words.
        sure: score from which an answer is told in words and drawn.
        check: reads a source whole and names what of it cannot be used, before a training begins; where that is worth it.
        views: the model seen through several views of each image (mirrored, at scales, in windows), where a task has that.
        spare_scalars: whether 0-dimensional weights, the slots' scales, are never decayed.
    """

    name: str
    about: str
    options: type[TrainOptions]
    open: Callable[[str], DataSet]
    build: Callable[..., nn.Module]
    start: Callable[[nn.Module, Any, Description], str]
    prepare: Callable[[Any, nn.Module], Preparation]
    training: Callable[[Any, nn.Module, Description, Source], tuple[Source, Transform]]
    evaluation: Callable[[Preparation], Transform]
    align: Callable[[Source, Description, str], Source]
    collate: Callable[[list[Item]], Batch]
    loss: Callable[[Any, nn.Module, Description], Loss]
    metrics: Callable[[Description], Any]
    headline: str
    show: Callable[[dict[str, float]], str]
    decode: Callable[[Any, Batch, Description, int], list[Any]]
    tell: Callable[[Any], str]
    columns: Mapping[str, type]
    rows: Callable[[Any], list[dict[str, Any]]]
    collect: Callable[[list[dict[str, Any]], Description], Any] | None = None
    curves: tuple[str, ...] = ()
    usual_top: int = 3
    forward: Callable[[nn.Module, Batch], Any] = of_images
    describe: Callable[[dict[str, float]], str] = percentages
    draw: Callable[[Image.Image, Any, Description], dict[str, Image.Image]] | None = None
    sure: float = 0.0
    check: Callable[[Source], Checked] | None = None
    views: Callable[[nn.Module, bool, list[float], int], nn.Module] | None = None
    spare_scalars: bool = False
