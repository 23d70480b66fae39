"""Semantic segmentation: a class for every pixel."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from glmix.data.check import check_maps
from glmix.data.images import BadImage, full_size
from glmix.data.loading import Batch, Transform, alike, padded
from glmix.data.masks import IGNORED, open_maps
from glmix.data.prepare import LEAST_SIDE, Preparation
from glmix.data.samples import Sample, Source
from glmix.models import build, config_of
from glmix.models.description import Description
from glmix.ranges import NonNegativeFloat, Share, Side, SideOrZero
from glmix.tasks.dense import DenseOptions, start
from glmix.tasks.pictures import colour_of, enlarged, painted
from glmix.training.task import Task

LONGEST = 4  # times the shorter side, that the longer one of an image may have in evaluation


@dataclass
class SegmentOptions(DenseOptions):
    """Options of `glmix train` for semantic segmentation.

    Args:
        head: semantic-fpn is light, upernet sees more context.
        crop_size: side of the square crops that are learned from, in pixels.
        image_size: shorter side of the images, before training scales them and in evaluation; 0 for crop_size.
        scales: least and largest factor by which a training image is scaled at random.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast, saturation and, a tenth of it, hue changes.
        aux_weight: factor on the loss of the auxiliary head, where the head has one.
    """

    head: Literal["semantic-fpn", "upernet"] = "semantic-fpn"
    crop_size: Side = 512
    image_size: SideOrZero = 0
    scales: tuple[float, float] = (0.5, 2.0)
    hflip: Share = 0.5
    color_jitter: NonNegativeFloat = 0.4
    aux_weight: NonNegativeFloat = 0.4

    GROUPS: ClassVar[dict[str, str]] = DenseOptions.GROUPS | {"crop_size": "images and their augmentation"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scales = (self.scales[0], self.scales[1])
        if not 0 < self.scales[0] <= self.scales[1]:
            raise ValueError(f"scales {list(self.scales)}: the least and the largest factor, such as [0.5, 2.0]")


def prepare(options: SegmentOptions, model: nn.Module) -> Preparation:
    """How the run prepares validation images: all of each, at its aspect."""
    side = options.image_size or options.crop_size
    usual = Preparation.of(config_of(model))
    return replace(usual, size=(side, LONGEST * side), resize="short", crop=1.0, interpolation="bilinear").checked()


@dataclass(frozen=True)
class Measured:
    """Transform of a sample to evaluate on: its target becomes the size (H, W) of the picture, and its map."""

    preparation: Preparation

    def __call__(self, sample: Sample) -> Sample:
        width, height = full_size(sample.image)
        target: dict[str, Any] = {"size": (height, width), "name": sample.name}
        if sample.target is not None:
            target["map"] = torch.from_numpy(np.ascontiguousarray(sample.target))
        return sample._replace(image=self.preparation(sample.image), target=target)


class Augmented:
    """Transform of a training sample: picture and map scaled, cut out, flipped alike; what is outside is ignored."""

    def __init__(self, options: SegmentOptions, preparation: Preparation) -> None:
        self.preparation, self.scales = preparation, options.scales
        self.interpolation = InterpolationMode(preparation.interpolation)
        side, jitter = options.crop_size, options.color_jitter
        mean = [round(255 * value) for value in preparation.mean]
        fill: dict[Any, Any] = {Image.Image: mean, tv_tensors.Mask: IGNORED}
        steps: list[Any] = [v2.RandomCrop(side, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip(options.hflip)]
        if jitter:
            steps.append(v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 10)))
        self.vary = v2.Compose(steps)

    def __call__(self, sample: Sample) -> Sample:
        picture, classes = sample.image, tv_tensors.Mask(torch.from_numpy(np.array(sample.target)))
        least, largest = self.scales
        factor = self.preparation.factor(picture.size) * (least + (largest - least) * torch.rand(()).item())
        size = [max(1, round(side * factor)) for side in (picture.height, picture.width)]
        picture = v2.functional.resize(picture, size, self.interpolation)
        classes = v2.functional.resize(classes[None], size, InterpolationMode.NEAREST)[0]
        picture, classes = self.vary(picture, tv_tensors.Mask(classes))
        return sample._replace(image=self.preparation.tensor(picture), target=classes.as_subclass(Tensor).long())


def training(
    options: SegmentOptions, model: nn.Module, description: Description, source: Source
) -> tuple[Source, Transform]:
    """Training images and maps through the augmentations of the options."""
    return source, Augmented(options, description.prepared)


class SegmentLoss:
    """Cross-entropy of all pixels that have a class, and `aux_weight` times that of the auxiliary head."""

    def __init__(self, options: SegmentOptions, model: nn.Module, description: Description) -> None:
        self.aux_weight = options.aux_weight

    def __call__(self, model: Any, batch: Batch, epoch: int) -> Tensor:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        classes = torch.stack(batch.targets)
        scores, auxiliary = model.scores(images)
        loss = self.entropy(scores, classes)
        return loss if auxiliary is None else loss + self.aux_weight * self.entropy(auxiliary, classes)

    @staticmethod
    def entropy(scores: Tensor, classes: Tensor) -> Tensor:
        """Mean over the pixels that have a class; 0 where none has."""
        losses = F.cross_entropy(scores.float(), classes, ignore_index=IGNORED, reduction="sum")
        return losses / (classes != IGNORED).sum().clamp(min=1)


def forward(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Class indices (H, W) of every pixel of each picture, as large as it was before it was prepared."""
    found: list[Tensor] = []
    targets = iter(batch.targets)
    for part, ((height, width), *_) in alike(batch, 1):
        for scores in model(part[..., :height, :width].contiguous(memory_format=torch.channels_last)):
            size = next(targets)["size"]
            found.append(F.interpolate(scores[None].float(), size, mode="bilinear", align_corners=False)[0].argmax(0))
    return found


class Views(nn.Module):
    """A segmenter that sees each image several times: mirrored, at several scales, in windows. Gives probabilities.

    Windows overlap by a third, and their scores are averaged where they do.

    Raises:
        ValueError: a scale of 0 or below, or a window below the network's stride.
    """

    def __init__(self, model: nn.Module, flip: bool, scales: list[float], window: int) -> None:
        super().__init__()
        if min(scales) <= 0:
            raise ValueError(f"--scales {scales}: above 0")
        if window and window < LEAST_SIDE:
            raise ValueError(f"--window {window}: at least {LEAST_SIDE} pixels, the network's stride")
        self.model, self.flip, self.scales, self.window = model, flip, scales, window

    def forward(self, images: Tensor) -> Tensor:
        seen = []
        for scale in self.scales:
            size = [max(LEAST_SIDE, round(side * scale)) for side in images.shape[-2:]]
            scaled = images if scale == 1 else F.interpolate(images, size, mode="bilinear", antialias=True)
            seen.append(self.probabilities(scaled, images))
            if self.flip:
                seen.append(self.probabilities(scaled.flip(3), images).flip(3))
        return torch.stack(seen).mean(0)

    def probabilities(self, images: Tensor, like: Tensor) -> Tensor:
        scores = self.in_windows(images) if self.window else self.model(images)
        return F.interpolate(scores.float().softmax(1), like.shape[-2:], mode="bilinear", align_corners=False)

    def in_windows(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        total, count = torch.zeros(()), torch.zeros(1, 1, height, width, device=images.device)
        for top in _places(height, self.window):
            for left in _places(width, self.window):
                part = (..., slice(top, top + self.window), slice(left, left + self.window))
                scores = self.model(images[part].contiguous(memory_format=torch.channels_last)).float()
                if not total.ndim:
                    total = scores.new_zeros(*scores.shape[:2], height, width)
                total[part] += scores
                count[part] += 1
        return total / count


def _places(side: int, window: int) -> list[int]:
    """Where windows begin along a side, so that neighbours overlap by at least a third and none reaches outside."""
    last = max(side - window, 0)
    steps = -(-last // max(1, window * 2 // 3))
    return [round(i * last / max(steps, 1)) for i in range(steps + 1)]


def align(source: Source, description: Description, data: str) -> Source:
    """`source`, whose maps have the model's class indices.

    Raises:
        UserError: its classes are others than the model's.
    """
    if source.classes == description.classes:
        return source
    index = description.class_index(source.classes, data)
    order = np.full(256, IGNORED, np.uint8)
    order[: len(source.classes)] = [index[name] for name in source.classes]
    return replace(source, targets=Reordered(source.targets, order), classes=description.classes)


@dataclass(frozen=True)
class Reordered:
    """Maps whose class indices are others: `order[index]`."""

    maps: Any
    order: Any

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Any:
        return self.order[self.maps[index]]

    def mark(self, index: int) -> str:
        return str(self.maps.mark(index))


class PixelScores(nn.Module):
    """Mean IoU, mean accuracy and accuracy of all pixels, in percent, from one confusion matrix of the whole data.

    Classes that are neither there nor found do not count for the means; pixels without a class count for nothing.
    """

    WORST = 10  # images that are named

    def __init__(self, description: Description) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassConfusionMatrix  # slow to import, as for classification

        self.names = description.names
        self.matrix = MulticlassConfusionMatrix(len(description.classes), ignore_index=IGNORED)
        self.images: list[tuple[float, str]] = []

    def update(self, outputs: Sequence[Tensor], targets: Sequence[dict[str, Any]]) -> None:
        for found, target in zip(outputs, targets, strict=True):
            wanted = target["map"].long().to(found.device)
            if wanted.shape != found.shape:
                raise BadImage(target["name"], "its map has another size than the picture")
            self.matrix.update(found.flatten(), wanted.flatten())
            kept = wanted != IGNORED
            if kept.any():
                self.images.append((float((found == wanted)[kept].float().mean()), target["name"]))

    def compute(self) -> dict[str, float]:
        table = self.matrix.compute().double()
        right, there, found = table.diag(), table.sum(1), table.sum(0)
        union = there + found - right
        self.iou, self.accuracy = right / union, right / there  # not a number where a class is absent
        return {
            "miou": 100 * float(self.iou[union > 0].mean()),
            "macc": 100 * float(self.accuracy[there > 0].mean()),
            "aacc": 100 * float(right.sum() / there.sum()),
        }

    def details(self) -> dict[str, Any]:
        """IoU and accuracy of each class that is there, in percent, and the images with the fewest right pixels."""
        classes = {
            name: {"iou": 100 * iou, "accuracy": 100 * accuracy}
            for name, iou, accuracy in zip(self.names, self.iou.tolist(), self.accuracy.tolist(), strict=True)
            if iou == iou
        }
        worst = [{"image": name, "accuracy": 100 * share} for share, name in sorted(self.images)[: self.WORST]]
        return {"classes": classes, "worst": worst}

    def reset(self) -> None:
        self.matrix.reset()
        self.images = []


def decode(found: list[Tensor], batch: Batch, description: Description, top: int) -> list[Any]:
    """The classes of each picture that cover the most of it: name, share of the pixels; and their map."""
    answers = []
    for classes in found:
        counts = classes.flatten().bincount(minlength=len(description.names)).tolist()
        largest = sorted(range(len(counts)), key=lambda i: -counts[i])[:top]
        shares = [(i, counts[i] / classes.numel()) for i in largest if counts[i]]
        answers.append(
            [
                {"label": description.classes[i], "name": description.names[i], "class": i, "share": round(share, 4)}
                for i, share in shares
            ]
        )
    return answers


def draw(picture: Image.Image, found: Tensor, description: Description) -> dict[str, Image.Image]:
    """The classes over the picture, with a legend; and the map itself, class indices with the same colours as palette."""
    classes = found.cpu().numpy()
    indices = Image.fromarray(classes.astype(np.uint8))
    indices.putpalette([part for i in range(256) for part in colour_of(i)])
    size = enlarged(indices.size)
    larger = np.asarray(indices.resize(size, Image.Resampling.NEAREST))
    return {"classes": painted(picture.resize(size), larger, description.names), "map": indices}


SEGMENT = Task(
    name="segment",
    about="a class for every pixel",
    options=SegmentOptions,
    open=open_maps,
    build=build,
    start=start,
    prepare=prepare,
    training=training,
    evaluation=Measured,
    align=align,
    collate=partial(padded, multiple=1),
    loss=SegmentLoss,
    metrics=PixelScores,
    headline="miou",
    show=lambda scores: f"mIoU {scores['miou']:.1f} %",
    decode=decode,
    tell=lambda answers: ", ".join(f"{a['name']} {100 * a['share']:.0f} %" for a in answers),
    columns={"label": str, "name": str, "share": float},
    rows=lambda answers: answers,
    forward=forward,
    views=Views,
    draw=draw,
    check=check_maps,
)
