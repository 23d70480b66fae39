"""Classification: one label an image."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from glmix.console import say
from glmix.data.loading import Batch, OfImage, Transform, stack
from glmix.data.prepare import Augmentation, Preparation, training_transform
from glmix.data.samples import Source
from glmix.data.sources import open_data
from glmix.models import build, config_of, load_body
from glmix.models.description import Description
from glmix.ranges import NonNegativeFloat, PositiveInt, Share, ShareAboveZero, Side, SideOrZero
from glmix.training.grids import check_grids, own_grid, set_grid
from glmix.training.options import TrainOptions
from glmix.training.task import Task

Answers = list[dict[str, Any]]  # `label` and `name` of each class and its `probability`, the likeliest first


@dataclass
class ClassifyOptions(TrainOptions, Augmentation):
    """Options of `glmix train` for classification.

    Args:
        linear_probe: train the classifier alone; all else stays as it is in use.
        image_size: side of training images, in pixels.
        start_size: side in the first epoch, growing to image_size by two thirds of the run; 0 for image_size.
        eval_size: side of validation images; 0 for image_size.
        eval_crop: share of the shorter side that validation images keep.
        eval_fit: crop takes the middle of a validation image, squash all of it whatever its aspect.
        repeats: how often an image comes, augmented anew, in an epoch of unchanged length (repeated augmentation).
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mix_prob: probability that a batch is mixed.
        label_smoothing: share of the label spread over all classes.
        slot_distill: with slot_grids, each step also learns the labels with the largest grid, and the drawn one learns its
            answers (in-place distillation; Yu and Huang, "Universally Slimmable Networks", 2019); about twice the time.
    """

    linear_probe: bool = False
    image_size: Side = 128
    start_size: SideOrZero = 0
    eval_size: SideOrZero = 0
    eval_crop: ShareAboveZero = 1.0
    eval_fit: Literal["crop", "squash"] = "crop"
    repeats: PositiveInt = 1
    mixup: NonNegativeFloat = 0.2
    cutmix: NonNegativeFloat = 1.0
    mix_prob: Share = 0.5
    label_smoothing: Share = 0.1
    slot_distill: bool = False

    GROUPS: ClassVar[dict[str, str]] = TrainOptions.GROUPS | {
        "crop_scale": "images and their augmentation",
        "linear_probe": "classification",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_size > self.image_size:
            raise ValueError(f"start_size {self.start_size} is above image_size {self.image_size}; images grow to that")
        if self.slot_distill and (not self.slot_grids or self.grad_checkpointing):
            raise ValueError("slot_distill is of slot_grids, and without grad_checkpointing, whose recomputed blocks would "
                             "have one grid alone")  # fmt: skip
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix, not {self.batch_size}")


def start(model: Any, options: ClassifyOptions, description: Description) -> str:
    """The weights of `init`, and of a linear probe only the classifiers left to learn."""
    if options.slot_grids:
        check_grids(model, options.slot_grids, options.start_size or options.image_size)
    said = load_body(model, options.init, description.classes) if options.init else ""
    if options.linear_probe:
        model.requires_grad_(False)
        for head in (model.get_classifier(), getattr(model, "aux_head", None)):
            if head is not None:
                head.requires_grad_(True)
    return said


def prepare(options: ClassifyOptions, model: Any) -> Preparation:
    """How the run prepares validation images."""
    side = options.eval_size or options.image_size
    usual = Preparation.of(config_of(model))
    channels = getattr(model, "in_chans", usual.channels)
    sized = replace(usual, size=(side, side), channels=channels)
    return replace(sized, resize=options.eval_fit, crop=options.eval_crop).checked()


def training(
    options: ClassifyOptions, model: nn.Module, description: Description, source: Source
) -> tuple[Source, Transform]:
    """Training images through the augmentations of the options."""
    return source, OfImage(training_transform(options, options.image_size, description.prepared))


def align(source: Source, description: Description, data: str) -> Source:
    """`source` with the model's class indices, by class name; in the folder's order where the weights name none.

    Raises:
        UserError: a class is none of the model's.
    """
    classes = description.classes
    if not description.named and len(source.classes) == len(classes) and not set(source.classes) & set(classes):
        say(f"the weights name no classes; those of {data} are taken in their order")
        return source
    index = description.class_index(source.classes, data)
    return replace(source, targets=[index[source.classes[label]] for label in source.targets], classes=classes)


def size_at(options: ClassifyOptions, epoch: int) -> int:
    """Side of training images in an epoch, a multiple of 16 while they grow."""
    grown_by = options.epochs * 2 / 3
    if not options.start_size or epoch >= grown_by:
        return options.image_size
    return int(options.start_size + (options.image_size - options.start_size) * epoch / grown_by) // 16 * 16


def resized(images: Tensor, side: int) -> Tensor:
    """A batch at `side` pixels, channels last in memory."""
    if images.shape[-1] != side:
        images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)


class ClassifyLoss:
    """Cross-entropy of images at the size of the epoch, mixed and smoothed as asked."""

    def __init__(self, options: ClassifyOptions, model: nn.Module, description: Description) -> None:
        self.options, self.classes = options, len(description.classes)
        self.mix: Mixup | None = None
        if options.mixup or options.cutmix:
            smoothing = {"label_smoothing": options.label_smoothing, "num_classes": self.classes}
            self.mix = Mixup(options.mixup, options.cutmix, prob=options.mix_prob, **smoothing)

    def __call__(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        images = resized(batch.images, size_at(self.options, epoch))
        if self.mix is not None and len(images) % 2 == 0:
            images, targets = self.mix(images, batch.targets)
        else:
            targets = F.one_hot(batch.targets, self.classes).float()
            targets = targets * (1 - self.options.label_smoothing) + self.options.label_smoothing / self.classes
        if self.options.slot_distill:
            return self.distilled(model, images, targets)
        return F.cross_entropy(model(images).float(), targets)

    def distilled(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean of the largest grid's cross-entropy with the targets, and the drawn grid's with what the largest answers."""
        drawn, sides = own_grid(model), self.options.slot_grids
        assert drawn and sides
        set_grid(model, (sides[1], sides[1]))
        answers = model(images).float()
        set_grid(model, drawn)
        learned = F.cross_entropy(model(images).float(), answers.detach().softmax(1))
        return (F.cross_entropy(answers, targets) + learned) / 2


class Scores(nn.Module):
    """Top-1 and top-5 accuracy in percent and mean cross-entropy, gathered batch by batch (and over processes)."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        from torchmetrics import MeanMetric  # takes two seconds, which predictions have no use for
        from torchmetrics.classification import MulticlassAccuracy

        classes = len(description.classes)
        self.top1 = MulticlassAccuracy(classes, average="micro")
        self.top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.loss = MeanMetric()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        logits = logits.float()
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


def decode(logits: Tensor, batch: Batch, description: Description, top: int) -> list[Answers]:
    """The `top` classes of each image."""
    best = logits.float().softmax(1).topk(min(top, logits.shape[1]))
    rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    labels, names = description.classes, description.names
    return [
        [{"label": labels[i], "name": names[i], "probability": round(p, 6)} for p, i in zip(*row, strict=True)]
        for row in rows
    ]


CLASSIFY = Task(
    name="classify",
    about="one label an image",
    options=ClassifyOptions,
    open=open_data,
    build=build,
    start=start,
    prepare=prepare,
    training=training,
    evaluation=OfImage,
    align=align,
    collate=stack,
    loss=ClassifyLoss,
    metrics=Scores,
    headline="top1",
    show=lambda scores: f"top-1 {scores['top1']:.1f} %",
    decode=decode,
    tell=lambda answers: ", ".join(f"{a['name']} {100 * a['probability']:.0f} %" for a in answers),
    columns={"label": str, "name": str, "probability": float},
    rows=lambda answers: answers,
)
