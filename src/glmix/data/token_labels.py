"""Token labels: for every training image, a coarse map of what a teacher sees at each place of it.

A folder holds them, written by `glmix label-tokens`:

- `labels.json`, the header: `format`, `teacher` (its name and a checksum of its weights), `size` (side in pixels that
  images were squashed to for it), `classes` (those of the data, in order), `digest` (of the images; see `digest_of`),
  `images` (their number), `grid` (rows and columns of a map), `top` (scores per place) and `shard` (images per shard).
- `00000.safetensors`, `00001.safetensors`, ...: the maps of `shard` images each, in the order of the data's files. For
  n images, `classes` is uint16 (n, rows, columns, top), class indices, best first; `scores` is float16 of that shape,
  their probabilities, all 0 for an image that could not be read. The metadata holds `crc32` of both arrays' bytes.

That is 4 bytes a score: 7 x 7 places of 5 scores are 1 KB an image, 1.3 GB for ImageNet. A map is read by itself. The
header is there first, and a shard has its name only when it is whole, so a run that was killed leaves nothing to mend.
"""

import hashlib
import json
import random
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.numpy
import torch
from numpy import ndarray
from PIL import Image
from safetensors import SafetensorError, safe_open
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import functional as TF

from glmix.data.images import BadImage, ImageSet
from glmix.data.loading import Batch, Images, Prepared, collate
from glmix.data.samples import SampleSet
from glmix.data.transforms import training_transform
from glmix.errors import UserError
from glmix.files import written_whole
from glmix.options import TrainOptions

FORMAT = "glmix token labels 1"
TokenMap = tuple[ndarray, ndarray]  # class indices and probabilities, (rows, columns, top) each


@dataclass(frozen=True)
class TokenLabels:
    """The labels in the folder `root`; the other attributes are those of the header (see the module)."""

    root: Path
    teacher: str
    size: int
    classes: list[str]
    digest: str
    images: int
    grid: tuple[int, int]
    top: int
    shard: int

    @property
    def shards(self) -> list[Path]:
        """The files of all shards, there or not."""
        return [self.root / f"{i:05d}.safetensors" for i in range(-(-self.images // self.shard))]

    def indices(self, number: int) -> range:
        """The images whose maps are in a shard."""
        return range(number * self.shard, min(self.images, (number + 1) * self.shard))

    def write_header(self) -> None:
        header = {"format": FORMAT} | {k: v for k, v in asdict(self).items() if k != "root"}
        with written_whole(self.root / "labels.json", "w") as file:
            json.dump(header, file, indent=1)

    def write(self, number: int, classes: ndarray, scores: ndarray) -> None:
        """Write a shard: both arrays (n, rows, columns, top), for its n `indices`."""
        arrays = {"classes": classes.astype(np.uint16), "scores": scores.astype(np.float16)}
        with written_whole(self.shards[number]) as file:
            file.write(safetensors.numpy.save(arrays, {"crc32": _checksum(arrays)}))

    def is_whole(self, number: int) -> bool:
        """Whether a shard is there, complete, and has the bytes that were written."""
        try:
            with safe_open(self.shards[number], "np") as file:
                arrays = {name: file.get_tensor(name) for name in ("classes", "scores")}
                intact = (file.metadata() or {}).get("crc32") == _checksum(arrays)
        except (OSError, SafetensorError):
            return False
        return intact and arrays["scores"].shape == (len(self.indices(number)), *self.grid, self.top)

    def read(self, index: int) -> TokenMap:
        """The map of the image at `index`.

        Raises:
            BadImage: the teacher could not read the image.
        """
        number, place = divmod(index, self.shard)
        with safe_open(self.shards[number], "np") as file:
            classes, scores = (file.get_slice(name)[place] for name in ("classes", "scores"))
        if not scores.any():
            raise BadImage(f"{self.root}: no labels of image {index}, which the teacher could not read")
        return classes.astype(np.int64), scores.astype(np.float32)


def _checksum(arrays: dict[str, ndarray]) -> str:
    return str(zlib.crc32(arrays["scores"].tobytes(), zlib.crc32(arrays["classes"].tobytes())))


def digest_of(images: Images) -> str:
    """A hash of which images these are: names, labels, order, and sizes where they are files, wherever those lie."""
    names = getattr(images, "files", range(len(images)))
    sizes = [getattr(images, "size", 0)] * len(images)  # of generated scenes, in pixels
    if isinstance(images, ImageSet) and not isinstance(images, SampleSet):
        paths = [images.root / file for file in images.files]
        # -1 for a link that leads nowhere: an unusable image, found as such when it is read
        sizes = [s for _, s in images.spans or []] or [p.stat().st_size if p.exists() else -1 for p in paths]
    result = hashlib.sha256()
    for name, size, label in zip(names, sizes, images.labels, strict=True):
        result.update(f"{name}\t{size}\t{images.classes[label]}\n".encode(errors="surrogateescape"))
    return result.hexdigest()


def read_header(source: str | Path) -> TokenLabels | None:
    """The labels in a folder, unchecked; None if none were begun there.

    Raises:
        UserError: the header is damaged.
    """
    path = Path(source) / "labels.json"
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_bytes())
        if header.pop("format") != FORMAT:
            raise ValueError("another format")
        return TokenLabels(Path(source), **{**header, "grid": tuple(header["grid"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged, or of another version ({error}); remove it and write the labels anew"
        ) from error


def open_token_labels(source: str | Path, images: Images) -> TokenLabels:
    """The labels in a folder, after a check that they are complete, undamaged, and made for these `images`.

    Raises:
        UserError: they are not, or there are none.
    """
    labels = read_header(source)
    if labels is None:
        raise UserError(f"{source}: no token labels here; `glmix label-tokens --out {source}` writes them")
    if labels.classes != images.classes or labels.digest != digest_of(images):
        raise UserError(
            f"{source}: labels of other images than these ({labels.images} there, {len(images)} here, or other names, "
            "sizes or classes); run `glmix label-tokens` on this data, into another folder"
        )
    bad = [path.name for number, path in enumerate(labels.shards) if not labels.is_whole(number)]
    if bad:
        raise UserError(
            f"{source}: {len(bad)} of {len(labels.shards)} shards missing or damaged (first: {bad[0]}); "
            "the same `glmix label-tokens` command writes them again"
        )
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# Training: an image and its map go through the same crop and flip.


def dense_target(
    tokens: TokenMap, box: tuple[float, float, float, float], grid: tuple[int, int], classes: int
) -> Tensor:
    """Class probabilities (rows, columns, classes) of the places of a `grid` laid over a part of the image.

    Each place gets the mean of the map over its own area, bilinear between the map's places (RoIAlign; He et al., 2017).
    What these have left beyond their best classes is spread evenly over all classes.

    Args:
        tokens: the map of the whole image.
        box: left, top, right and bottom of the part, in shares of the image's sides.
        grid: rows and columns.
        classes: their number.
    """
    indices, scores = tokens
    rows, columns, _ = indices.shape
    # only classes that the map has are resampled: all of ImageNet's would take longer than the image itself
    present, place = np.unique(indices, return_inverse=True)
    values = np.zeros((rows, columns, len(present) + 1), np.float32)
    np.put_along_axis(values, place.reshape(indices.shape), scores, -1)
    values[..., -1] = (1 - scores.sum(-1)).clip(min=0) / classes
    corners = torch.tensor([[0, box[0] * columns, box[1] * rows, box[2] * columns, box[3] * rows]])
    part = roi_align(torch.from_numpy(values).permute(2, 0, 1)[None], corners, grid, aligned=True)[0].permute(1, 2, 0)
    target = part[..., -1:].repeat(1, 1, classes)
    target[..., torch.from_numpy(present)] += part[..., :-1]
    return target


class TokenTransform:
    """An image and its map to a tensor (C, H, W) and class probabilities (rows, columns, classes): crop and flip alike.

    Colours and erasing concern the image alone. Of a RandAugment policy only the changes of colour are drawn: shears,
    turns and shifts would move the image under its labels.

    Args:
        options: of the run.
        image: mean, std and interpolation, as in a checkpoint.
        grid: rows and columns of the network's last grid.
        classes: their number.

    Raises:
        UserError: `auto_augment` is no plain RandAugment policy.
    """

    def __init__(self, options: TrainOptions, image: dict[str, Any], grid: tuple[int, int], classes: int) -> None:
        self.grid, self.classes, self.hflip = grid, classes, options.hflip
        crops, self.colours, self.finish = training_transform(options, image, separate=True)
        self.crop = crops.transforms[0]
        if options.auto_augment:
            augment = self.colours.transforms[0]
            if not isinstance(augment, RandAugment) or augment.choice_weights is not None:
                raise UserError(
                    f"auto_augment {options.auto_augment}: token labels go with unweighted rand-… policies only"
                )
            augment.ops = [o for o in augment.ops if not o.name.startswith(("Shear", "Translate", "Rotate"))]

    def __call__(self, pair: tuple[Image.Image, TokenMap]) -> tuple[Tensor, Tensor]:
        image, tokens = pair
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        box = left / image.width, top / image.height, (left + width) / image.width, (top + height) / image.height
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        image = TF.resized_crop(image, top, left, height, width, self.crop.size, mode)
        dense = dense_target(tokens, box, self.grid, self.classes)
        if random.random() < self.hflip:
            image, dense = TF.hflip(image), dense.flip(1)
        return self.finish(self.colours(image)), dense


class LabelledImages:
    """Images and their token labels, read in pairs; `glmix.data.loading.Images` in all else."""

    def __init__(self, images: Images, tokens: TokenLabels) -> None:
        self.images, self.tokens = images, tokens
        self.labels, self.classes, self.names = images.labels, images.classes, images.names

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, TokenMap]:
        return self.images.read(index), self.tokens.read(index)


def prepare_tokens(images: Images, tokens: TokenLabels, transform: TokenTransform, seed: int) -> Prepared:
    """The data set for training: `Prepared`, its samples pairs of image and dense target."""
    return Prepared(cast(Any, LabelledImages(images, tokens)), transform, seed, replace_bad=True)


@dataclass
class TokenBatch(Batch):
    """A batch with `dense`, the class probabilities (B, rows, columns, classes) of the places of the last grid."""

    dense: Tensor

    def pin_memory(self) -> "TokenBatch":
        return TokenBatch(**vars(super().pin_memory()), dense=self.dense.pin_memory())

    def to(self, device: Any, **kwargs: Any) -> "TokenBatch":
        return TokenBatch(**vars(super().to(device, **kwargs)), dense=self.dense.to(device, **kwargs))


def collate_tokens(samples: list[tuple[tuple[Tensor, Tensor] | None, int, list[str]]]) -> TokenBatch:
    """Stack what is usable."""
    batch = collate([(pair and pair[0], label, skipped) for pair, label, skipped in samples])
    dense = [pair[1] for pair, *_ in samples if pair is not None]
    return TokenBatch(**vars(batch), dense=torch.stack(dense) if dense else torch.empty(0, 1, 1, 1))
