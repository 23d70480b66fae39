"""Training with token labels: every place of the last grid learns what a teacher saw there."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from glmix.data.loading import Batch
from glmix.data.token_labels import TokenBatch
from glmix.errors import UserError
from glmix.models import GLNet
from glmix.options import TrainOptions
from glmix.tasks.classification import Classifier

Box = tuple[int, int, int, int]  # first row, first column, row and column behind the last


def token_grid(model: GLNet, side: int) -> tuple[int, int]:
    """Rows and columns of the last grid for images of `side` pixels.

    Raises:
        UserError: the model labels no places, or its grid does not cover such images exactly.
    """
    if not model.token_labeling:
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


def mixed_targets(dense: Tensor, box: Box) -> Tensor:
    """Class targets (B, classes) of images that have the batch in reverse order in a box: both means, by area.

    Args:
        dense: targets (B, rows, columns, classes) of the places of the unmixed images.
        box: part of the grid.
    """
    top, left, bottom, right = box
    share = (bottom - top) * (right - left) / (dense.shape[1] * dense.shape[2])
    whole = dense.mean((1, 2))
    return (1 - share) * whole + share * whole.flip(0)


class TokenLabeler(Classifier):
    """Trains with token labels: class loss of images mixed by MixToken, and `dense_weight` times the loss of all places.

    As in the reference, the class loss has the teacher's labels too, their mean over the crop: the label of the folder
    is not used, and nothing is smoothed. Validation is that of `Classifier`.

    Raises:
        UserError: the model has no head for token labels, or the options mix images in another way too.

    Source: "All Tokens Matter" (Jiang et al., 2021), as the reference's `main_tklb` trains with it.
    """

    def __init__(self, model: GLNet, options: TrainOptions, *others: Any) -> None:
        rows, _ = token_grid(model, options.image_size)
        if options.mixup or options.cutmix:
            raise UserError("with token labels, MixToken mixes the images; set mixup and cutmix to 0")
        super().__init__(model, options, *others)
        self.stride = options.image_size // rows

    def size_now(self) -> int:
        """Side of training images in this epoch, which the last grid covers exactly."""
        return super().size_now() // self.stride * self.stride

    def loss_of(self, images: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of images mixed by MixToken, and of all their places."""
        assert isinstance(batch, TokenBatch)
        grid = token_grid(self.model, images.shape[-1])
        dense = batch.dense
        if dense.shape[1:3] != grid:
            dense = F.adaptive_avg_pool2d(dense.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
        box = random_box(*grid)
        logits, places = self.model.forward_mixtoken(images, box)
        dense_loss = F.cross_entropy(places.float().flatten(0, 1), dense.flatten(0, 2))
        return F.cross_entropy(logits.float(), mixed_targets(dense, box)) + self.options.dense_weight * dense_loss
