"""`glmix label-tokens`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader

from glmix.commands.common import default_workers, pick_device
from glmix.data.loading import Prepared
from glmix.data.sources import open_split
from glmix.data.token_labels import TokenLabels, digest_of, read_header
from glmix.errors import UserError
from glmix.models import MODEL_NAMES, load
from glmix.models.weights import fingerprint

SHARD = 2048  # images per file: what a kill can cost


def label_tokens(
    teacher: str,
    data: str,
    out: str,
    top: int = 5,
    size: int = 0,
    weights: str = "",
    batch_size: int = 64,
    workers: int = -1,
) -> None:
    """Write what a teacher sees at every place of the training images; the same command goes on where it was stopped.

    Args:
        teacher: timm model (best one that averages places before its classifier), or run folder or file of ours.
        data: folder of class folders, or with train/ in it, or a tar of one, or 'scenes'.
        out: folder of the labels.
        top: classes kept per place.
        size: side in pixels that images are squashed to for the teacher; 0 for its own.
        weights: file with the weights of a timm model; left out, timm downloads them.
        batch_size: images at a time.
        workers: processes that load images; -1 chooses.
    """
    if top < 1 or batch_size < 1 or size < 0:
        raise UserError(f"--top {top} and --batch-size {batch_size} are at least 1, and --size {size} at least 0")
    images = open_split(data, "train")
    model, names, config = load_teacher(teacher, weights)
    columns = class_columns(teacher, names, model.num_classes, images.classes)
    side = size or config["input_size"][-1]
    dense = DenseTeacher(teacher, model, columns, side).to(pick_device())
    name = f"{teacher} {fingerprint(model)}"  # other weights under the same name are another teacher
    header = (name, side, images.classes, digest_of(images), len(images), dense.grid, min(top, len(columns)))
    begun = read_header(out)
    labels = TokenLabels(Path(out), *header, shard=begun.shard if begun else SHARD)
    if begun and begun != labels:
        raise UserError(f"{out}: has labels of another teacher, size, top or other images; choose another --out")
    labels.write_header()
    transform = create_transform(**config | {"input_size": (3, side, side), "crop_pct": 1.0, "crop_mode": "squash"})
    skipped: list[str] = []
    for number in range(len(labels.shards)):
        if labels.is_whole(number):
            continue
        indices = labels.indices(number)
        classes, scores = np.zeros((2, len(indices), *labels.grid, labels.top), np.float32)
        loader = DataLoader(
            Prepared(images, transform),
            batch_size,
            sampler=[(0, index, 0) for index in indices],
            num_workers=default_workers() if workers < 0 else workers,
            collate_fn=list,
        )
        for start, samples in zip(range(0, len(indices), batch_size), loader, strict=True):
            skipped += [name for *_, names in samples for name in names]
            at = [start + i for i, (image, *_) in enumerate(samples) if image is not None]
            if at:
                best = dense.label(torch.stack([image for image, *_ in samples if image is not None])).topk(labels.top)
                if not best.values.isfinite().all():
                    raise UserError(f"{teacher}: its scores are not finite; are these weights of this model?")
                classes[at], scores[at] = best.indices.cpu().numpy(), best.values.cpu().numpy()
        labels.write(number, classes, scores)
        print(f"{indices.stop} of {len(images)} images", file=sys.stderr)
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")
    print(
        f"{len(images)} images, {labels.grid[0]} x {labels.grid[1]} places, top {labels.top} of {len(columns)} classes"
    )
    print(f"next: glmix train --model glnet_4g_tklb --data {data} --token-labels {out} --mixup 0 --cutmix 0 --ema 0")


def load_teacher(teacher: str, weights: str = "") -> tuple[Any, list[str] | None, dict[str, Any]]:
    """A model, the names of its classes where they are known, and how images are prepared for it (timm's terms).

    Raises:
        UserError: no such model or file, or its weights cannot be had.
    """
    if Path(teacher).exists() or teacher.split(".")[0] in MODEL_NAMES:
        ours, described = load(teacher)
        numbers = [str(i) for i in range(ours.num_classes)]  # what `load` makes up where a file names no classes
        return ours, None if described.classes == numbers else described.classes, described.image
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
    config = {
        k: v for k, v in resolve_model_data_config(model).items() if k in ("input_size", "interpolation", "mean", "std")
    }
    subset = infer_imagenet_subset(model)
    return model, ImageNetInfo(subset).label_names() if subset else None, config


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
    """Class probabilities (B, rows, columns, classes) at each place of a teacher's last grid, from images (B, 3, H, W).

    Each place is given to the model's own head as if it were all that the head has to pool. Where the head averages and
    classifies (ResNet, EfficientNet, NFNet, Swin, GLNet, most others), the places' logits average to the image's; where
    it has a norm between (ConvNeXt), each place is normed. Of token models (ViT), patches are given to it, which works
    where the head averages them; that of a class token never learned to read them.

    Args:
        name: for messages.
        model: has timm's `forward_features`, `forward_head` and `num_features`; features are (B, C, H, W), (B, H, W, C)
            or (B, prefix + H*W, C).
        kept: of the teacher's classes, which probabilities sum to 1.
        size: side of the images in pixels.

    Raises:
        UserError: features or head are of another kind, or the model takes no images of this size.
    """

    def __init__(self, name: str, model: Any, kept: list[int], size: int) -> None:
        super().__init__()
        self.model, self.kept = model.eval(), kept
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
            return self(images.to(device))

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
        return scores.softmax(-1).unflatten(0, grid_BHWC.shape[:3])
