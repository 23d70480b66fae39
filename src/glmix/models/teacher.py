"""Teachers: models that tell what they see at every place of an image."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from glmix.data.prepare import Preparation
from glmix.errors import UserError
from glmix.models.load import load, names_model


def load_teacher(teacher: str, weights: str = "") -> tuple[Any, list[str] | None, Preparation]:
    """A model, the names of its classes where they are known, and how images are prepared for it.

    Args:
        teacher: timm model, or run folder, file or model name of ours.
        weights: file with the weights of a timm model; left out, timm downloads them.

    Raises:
        UserError: no such model or file, or its weights cannot be had.
    """
    if Path(teacher).exists() or names_model(teacher):
        if weights:
            raise UserError(f"--weights {weights}: {teacher} has its own; leave it out, or name a timm model")
        ours, described = load(teacher)
        assert described.preparation is not None
        known = described.named or ours.num_classes == 1000  # a thousand without names are ImageNet's
        return ours, described.classes if known else None, described.preparation
    if not timm.is_model(teacher):
        raise UserError(f"{teacher}: no such run folder, checkpoint or timm model")
    given: dict[str, Any] = {}
    try:
        if weights:
            tensors = load_state_dict(weights, weights_only=True)  # nothing in the file is executed
            classifier: Any = timm.get_pretrained_cfg(teacher)
            count = tensors[f"{classifier.classifier}.weight"].shape[0]
            overlay = {"state_dict": tensors, "source": "", "file": None, "num_classes": count}
            given = {"num_classes": count, "pretrained_cfg_overlay": overlay}
        model: Any = timm.create_model(teacher, pretrained=True, **given)
    except Exception as error:  # whatever downloads and broken files bring
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise UserError(f"{teacher}: no weights ({reason}); give a file of this model's by --weights") from error
    preparation = Preparation.of(resolve_model_data_config(model))
    subset = infer_imagenet_subset(model)
    return model, ImageNetInfo(subset).label_names() if subset else None, preparation


def class_columns(teacher: str, names: list[str] | None, count: int, classes: list[str]) -> list[int]:
    """The place among the teacher's `count` classes of each of the data's: by name, or by index where it has no names.

    Raises:
        UserError: neither is possible.
    """
    index = {name: i for i, name in enumerate(names or (classes if count == len(classes) else []))}
    unknown = [name for name in classes if name not in index]
    if unknown:
        raise UserError(
            f"{teacher}: {len(unknown)} of {len(classes)} classes are not among its {count} (first: {unknown[0]}; "
            f"its own first: {names[0] if names else 'without a name'}); name the class folders as the teacher's classes"
        )
    return [index[name] for name in classes]


class DenseTeacher(nn.Module):
    """Class scores (B, rows, columns, classes) at each place of a teacher's last grid, from images (B, 3, H, W).

    Scores are the teacher's own, before softmax: training averages them over a crop, and takes the softmax last.

    Each place is given to the model's own head as if it were all that the head has to pool. Where the head averages and
    classifies (ResNet, EfficientNet, NFNet, Swin, GLNet, most others), the places' logits average to the image's; where
    it has a norm between (ConvNeXt), each place is normed. Of token models (ViT), patches are given to it, which works
    where the head averages them; that of a class token never learned to read them.

    Args:
        name: for messages.
        model: has timm's `forward_features`, `forward_head` and `num_features`; features are (B, C, H, W), (B, H, W, C)
            or (B, prefix + H*W, C).
        kept: the columns of the teacher's scores that are given.
        size: side of the images in pixels.

    Raises:
        UserError: features or head are of another kind, or the model takes no images of this size.
    """

    def __init__(self, name: str, model: Any, kept: list[int], size: int) -> None:
        super().__init__()
        self.model, self.kept = model.eval().to(memory_format=torch.channels_last), kept  # twice as fast on a CPU
        try:
            _, rows, columns, _ = self.label(torch.zeros(1, 3, size, size)).shape
            self.grid = rows, columns
            if self.grid == (1, 1):
                raise ValueError("it has a single place")
        except Exception as error:  # a foreign model can fail in any way
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(
                f"{name}: cannot label the places of images of {size} px ({reason}); "
                "choose a convolutional timm model or a glmix checkpoint, or another --size"
            ) from error

    @torch.inference_mode()
    def label(self, images: Tensor) -> Tensor:
        """`forward`, for images on the CPU, as fast as the device allows."""
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self(images.to(device, memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.forward_features(images)
        width = self.model.num_features
        if x.ndim == 3 and x.shape[2] == width:
            prefix = getattr(self.model, "num_prefix_tokens", 0)
            side = round((x.shape[1] - prefix) ** 0.5)
            grid_BHWC = x[:, prefix:].unflatten(1, (side, side))
            # each place stands for the prefix too: whichever of the two the head pools, it gets this place
            places = grid_BHWC.reshape(-1, 1, width).expand(-1, prefix + 1, -1)
        elif x.ndim == 4 and x.shape[1] == width:
            grid_BHWC = x.permute(0, 2, 3, 1)
            places = grid_BHWC.reshape(-1, width, 1, 1)
        elif x.ndim == 4 and x.shape[3] == width:
            grid_BHWC = x
            places = x.reshape(-1, 1, 1, width)
        else:
            raise ValueError(f"features of shape {tuple(x.shape)}")
        scores = self.model.forward_head(places)[:, self.kept].float()
        return scores.unflatten(0, grid_BHWC.shape[:3])
