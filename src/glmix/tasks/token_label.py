"""Training with token labels: every place of the last grid learns what a teacher saw there.

Source: "All Tokens Matter" (Jiang et al., 2021), as the reference's `main_tklb` trains with it.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from glmix.data.loading import Batch, Transform
from glmix.data.samples import Source
from glmix.data.token_labels import PairedTargets, TokenTransform, open_token_labels, read_header, token_targets
from glmix.errors import UserError
from glmix.models import GLNet
from glmix.models.description import Description
from glmix.ranges import NonNegativeFloat
from glmix.tasks.classify import CLASSIFY, ClassifyOptions, resized, size_at

Box = tuple[int, int, int, int]  # first row, first column, row and column behind the last


@dataclass
class TokenLabelOptions(ClassifyOptions):
    """Options of `glmix train` with token labels.

    Args:
        token_labels: folder that `glmix label-tokens` wrote, for models with the head for them.
        dense_weight: factor on the loss of all places.

    The cosine lies over all epochs, as in the reference's training with token labels (timm's rule).
    """

    task: str = "token-label"
    mixup: NonNegativeFloat = 0.0
    cutmix: NonNegativeFloat = 0.0
    warmup_lr: NonNegativeFloat = 1e-6
    warmup_prefix: bool = False
    token_labels: str = ""
    dense_weight: NonNegativeFloat = 0.5

    GROUPS: ClassVar[dict[str, str]] = ClassifyOptions.GROUPS | {"token_labels": "token labels"}
    FREE: ClassVar[set[str]] = ClassifyOptions.FREE | {"token_labels"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup or self.cutmix:
            raise ValueError("with token labels, MixToken mixes the images; set mixup and cutmix to 0")
        if self.slot_distill:
            raise ValueError("with token labels a teacher is there already; leave out slot_distill")


def token_grid(model: GLNet, side: int) -> tuple[int, int]:
    """Rows and columns of the last grid for images of `side` pixels.

    Raises:
        UserError: the model labels no places, or its grid does not cover such images exactly.
    """
    if not getattr(model, "token_labeling", False):
        raise UserError(
            "token labels need a model with a head for them: glnet_*_tklb, or model_args {token_labeling: true}"
        )
    stride: Any = model.feature_info[-1]["reduction"]
    if side % stride:
        raise UserError(f"with token labels, the side of images is a multiple of {stride}, not {side}")
    return side // stride, side // stride


def random_box(rows: int, columns: int) -> Box:
    """A part of a grid, as CutMix draws it: uniform in its share of the area and its centre, cut off at the borders."""
    share = np.sqrt(1 - np.random.beta(1, 1))
    height, width = int(rows * share) // 2, int(columns * share) // 2
    row, column = np.random.randint(rows), np.random.randint(columns)
    return max(row - height, 0), max(column - width, 0), min(row + height, rows), min(column + width, columns)


def mixed_targets(targets: Tensor, box: Box, grid: tuple[int, int]) -> Tensor:
    """Class targets (B, classes) of images that have the batch in reverse order in a box of their grid: by area."""
    top, left, bottom, right = box
    share = (bottom - top) * (right - left) / (grid[0] * grid[1])
    return (1 - share) * targets + share * targets.flip(0)


def training(
    options: TokenLabelOptions, model: Any, description: Description, source: Source
) -> tuple[Source, Transform]:
    """Training images and their label maps, flipped, moved and cropped alike."""
    if not options.token_labels:
        raise UserError("--task token-label needs --token-labels, a folder that `glmix label-tokens` wrote")
    tokens = open_token_labels(options.token_labels, source)
    transform = TokenTransform(options, options.image_size, description.prepared)
    return replace(source, targets=PairedTargets(source.targets, tokens)), transform


class TokenLoss:
    """Class loss of images mixed by MixToken, and `dense_weight` times the loss of all places.

    As in the reference, the class loss has the teacher's labels too, of the crop as one place: the label of the folder
    is not used.

    Raises:
        UserError: the model has no head for token labels, or not of as many classes.
    """

    columns: list[int] | None  # the data's classes among those of the labels; None where they are the same

    def __init__(self, options: TokenLabelOptions, model: Any, description: Description) -> None:
        rows, _ = token_grid(model, options.image_size)
        self.options, self.stride = options, options.image_size // rows
        labels = read_header(options.token_labels)
        known = labels.classes if labels is not None else description.classes
        self.classes, self.columns = len(known), None
        if known != description.classes:
            self.columns = [known.index(name) for name in description.classes]
        places = model.dense_classes or len(description.classes)
        if places != self.classes:
            raise UserError(
                f"{options.token_labels}: labels of {self.classes} classes, and the model's head for places has {places}; "
                f"give --model-args '{{token_labeling: true, dense_classes: {self.classes if self.columns else 0}}}'"
            )

    def __call__(self, model: Any, batch: Batch, epoch: int) -> Tensor:
        side = size_at(self.options, epoch) // self.stride * self.stride  # which the last grid covers exactly
        images, (_, indices, scores, boxes) = resized(batch.images, side), batch.targets
        grid = (side // self.stride, side // self.stride)
        smoothing = self.options.label_smoothing
        whole, dense = token_targets(indices, scores, boxes, grid, self.classes, smoothing, self.columns)
        box = random_box(*grid)
        logits, places = model.forward_mixtoken(images, box)
        dense_loss = F.cross_entropy(places.float().flatten(0, 1), dense.flatten(0, 2))
        return F.cross_entropy(logits.float(), mixed_targets(whole, box, grid)) + self.options.dense_weight * dense_loss


TOKEN_LABEL = replace(
    CLASSIFY,
    name="token-label",
    about="one label an image, learned from a teacher's labels of its places",
    options=TokenLabelOptions,
    training=training,
    loss=TokenLoss,
    spare_scalars=True,
)
