"""Token labels: for every training image, a coarse map of what a teacher sees at each place of it.

A folder holds them, written by `glmix label-tokens`:

- `labels.json`, the header: `format`, `teacher` (its name and a checksum of its weights), `size` (side in pixels that
  images were squashed to for it), `classes` (those of the data in order, or all of the teacher's), `digest` (of the images; see `Source.digest`),
  `images` (their number), `grid` (rows and columns of a map), `top` (scores per place) and `shard` (images per shard).
- `00000.safetensors`, `00001.safetensors`, ...: the maps of `shard` images each, in the order of the data's files. For
  n images, `classes` is uint16 (n, rows, columns, top), class indices, best first; `scores` is float16 of that shape,
  the teacher's scores of them (logits, before softmax), all 0 for an image that could not be read. The metadata holds `crc32` of both arrays' bytes.

That is 4 bytes a score: 7 x 7 places of 5 scores are 1 KB an image, 1.3 GB for ImageNet. A map is read by itself. The
header is there first, and a shard has its name only when it is whole, so a run that was killed leaves nothing to mend.

Published maps, one file an image, are read too: see `PublishedMaps`.
"""

import json
import math
import os
import random
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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

from glmix.data.images import BadImage
from glmix.data.prepare import Augmentation, Preparation, training_transform
from glmix.data.samples import Sample, Source
from glmix.errors import UserError
from glmix.files import written_whole

FORMAT = "glmix token labels 2"
PROBABILITIES = "glmix token labels 1"  # what the first version wrote in place of scores
TokenMap = tuple[ndarray, ndarray]  # class indices (int64) and scores (float32), (top, rows, columns) each


class TokenMaps(Protocol):
    """Maps by the index of their image."""

    def read(self, index: int) -> TokenMap: ...


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

    def whole_scores(self, number: int) -> ndarray | None:
        """The scores (n, rows, columns, top) of a shard that is there, complete, and has the bytes that were written."""
        try:
            with safe_open(self.shards[number], "np") as file:
                arrays = {name: file.get_tensor(name) for name in ("classes", "scores")}
                intact = (file.metadata() or {}).get("crc32") == _checksum(arrays)
        except (OSError, SafetensorError):
            return None
        whole = intact and arrays["scores"].shape == (len(self.indices(number)), *self.grid, self.top)
        return arrays["scores"] if whole else None

    def read(self, index: int) -> TokenMap:
        """The map of the image at `index`.

        Raises:
            BadImage: the teacher could not read the image.
        """
        number, place = divmod(index, self.shard)
        with safe_open(self.shards[number], "np") as file:
            classes, scores = (file.get_slice(name)[place] for name in ("classes", "scores"))
        if not scores.any():
            raise BadImage(str(self.root), f"no labels of image {index}, which the teacher could not read")
        return np.moveaxis(classes, -1, 0).astype(np.int64), np.moveaxis(scores, -1, 0).astype(np.float32)


def _checksum(arrays: dict[str, ndarray]) -> str:
    return str(zlib.crc32(arrays["scores"].tobytes(), zlib.crc32(arrays["classes"].tobytes())))


@dataclass(frozen=True)
class PublishedMaps:
    """Maps as the authors of "All Tokens Matter" give theirs away: a file CLASS/NAME.pt in `root` for each image.

    It holds one tensor (2, top, rows, columns) in float16: scores, best first, and the indices of their classes.

    Attributes:
        root: the folder of the class folders.
        names: CLASS/NAME of every image.
        classes: number of the data's classes.
        shape: top, rows and columns of every map; None before one was read.
    """

    root: Path
    names: list[str]
    classes: int
    shape: tuple[int, ...] | None = None

    def read(self, index: int) -> TokenMap:
        """The map of the image at `index`.

        Raises:
            UserError: the file is missing, damaged, of more classes, or holds something else.
        """
        path = self.root / f"{self.names[index]}.pt"
        try:
            both = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in any way
            reason = "missing" if isinstance(error, FileNotFoundError) else "damaged or cut"
            raise UserError(f"{path}: {reason}; unpack this label map again") from error
        if not isinstance(both, Tensor) or both.ndim != 4 or len(both) != 2 or not both.numel():
            raise UserError(f"{path}: no label map, which is a tensor (2, top, rows, columns) of scores and classes")
        scores, places = both.float().numpy()
        if scores.shape != (self.shape or scores.shape):
            raise UserError(
                f"{path}: of shape {scores.shape}, where other maps are {self.shape}; these do not go together"
            )
        if not both.isfinite().all() or (places < 0).any() or (places % 1).any():
            raise UserError(f"{path}: damaged, its scores or classes are no such numbers; unpack this label map again")
        if places.max() >= self.classes:
            raise UserError(
                f"{path}: has class {places.max():.0f}, counted from 0, and this data {self.classes} classes; "
                "`glmix label-tokens` makes maps for it"
            )
        if are_probabilities(scores, 0):
            raise UserError(
                f"{path}: probabilities, where a teacher's raw scores belong; `glmix label-tokens` makes maps"
            )
        return places.astype(np.int64), scores


def are_probabilities(scores: ndarray, axis: int) -> bool:
    """Whether these are probabilities of the best classes, along `axis`, rather than scores before softmax."""
    sums = scores.astype(np.float32).sum(axis)
    return bool((scores >= 0).all() and 0.5 < sums.max() < 1.01)


def read_header(source: str | Path) -> TokenLabels | None:
    """The labels in a folder, unchecked; None if none were begun there.

    Raises:
        UserError: the header is damaged, or of probabilities, as the first version had them.
    """
    path = Path(source) / "labels.json"
    if not path.is_file():
        return None
    try:
        header = json.loads(path.read_bytes())
        if header["format"] == PROBABILITIES:
            raise UserError(f"{source}: {_anew(header['teacher'], header['size'])}")
        if header.pop("format") != FORMAT:
            raise ValueError("another format")
        return TokenLabels(Path(source), **{**header, "grid": tuple(header["grid"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged, or of another version ({error}); remove it and write the labels anew"
        ) from error


def _anew(teacher: str, size: int) -> str:
    """What is wrong with a folder of probabilities, and the command that makes the labels anew."""
    name = str(teacher).rpartition(" ")[0] or teacher  # without the checksum
    return (
        "labels are probabilities, where a teacher's raw scores belong; make them anew: "
        f"glmix label-tokens --teacher {name} --size {size} --data DATA --out ANOTHER_FOLDER"
    )


def open_token_labels(source: str | Path, images: Source) -> TokenMaps:
    """The labels in a folder, after a check that they are complete, undamaged, and made for these `images`.

    They are those of `glmix label-tokens`, or published ones (`PublishedMaps`), of which each is checked when it is read.

    Raises:
        UserError: they are not, or there are none.
    """
    labels = read_header(source)
    if labels is None:
        return _open_published(Path(source), images)
    if not set(images.classes) <= set(labels.classes) or labels.digest != images.digest():
        raise UserError(
            f"{source}: labels of other images than these ({labels.images} of {len(labels.classes)} classes there, "
            f"{len(images)} of {len(images.classes)} here, or other names, sizes or classes); "
            "run `glmix label-tokens` on this data, into another folder"
        )
    bad = []
    for number, path in enumerate(labels.shards):
        scores = labels.whole_scores(number)
        if scores is None:
            bad.append(path.name)
        elif are_probabilities(scores, -1):
            raise UserError(f"{path}: {_anew(labels.teacher, labels.size)}")
    if bad:
        raise UserError(
            f"{source}: {len(bad)} of {len(labels.shards)} shards missing or damaged (first: {bad[0]}); "
            "the same `glmix label-tokens` command writes them again"
        )
    return labels


def _open_published(root: Path, images: Source) -> PublishedMaps:
    labels = [images.classes[images.targets[i]] for i in range(len(images))]
    names = [f"{label}/{Path(file).stem}" for file, label in zip(images.files, labels, strict=True)]
    folders = [root / name for name in images.classes if (root / name).is_dir()]
    if not names or not folders:
        raise UserError(f"{root}: no token labels here; `glmix label-tokens --out {root}` writes them")
    there = {f"{folder.name}/{file.name}" for folder in folders for file in os.scandir(folder)}
    lacking = [name for name in names if f"{name}.pt" not in there]
    if lacking:
        raise UserError(
            f"{root}: {len(lacking)} of {len(names)} images have no label map (first: {lacking[0]}.pt); "
            "unpack all of them, or are these maps of other images?"
        )
    maps = PublishedMaps(root, names, len(images.classes))
    return replace(maps, shape=maps.read(0)[0].shape)


# ---------------------------------------------------------------------------------------------------------------------
# Training: an image and its map are flipped, augmented and cropped alike.


def token_targets(
    indices: Tensor,
    scores: Tensor,
    boxes: Tensor,
    grid: tuple[int, int],
    classes: int,
    smoothing: float,
    columns: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the parts of images that were cropped out of them have to be called, as a whole and place by place.

    The map of scores, with 0 for the classes that it lacks, is averaged over the whole crop and over each place of its
    grid (RoIAlign; He et al., 2017), bilinear between the map's places; then follow softmax over all classes and
    smoothing, t (1 - s + s / C) + s / C, after which targets sum to 1 + s / C. A crop narrower than a place of the map
    reads a whole place. In the published training the corners are passed as top, left, bottom, right to a function of
    left, top, right, bottom, which reads another part of the map; here they are not.

    Args:
        indices: the best classes (B, top, rows, columns) at the places of the whole images' maps.
        scores: the teacher's scores of these, of the same shape.
        boxes: left, top, right and bottom of the crops (B, 4), in shares of the images' sides.
        grid: rows and columns of the crops.
        classes: their number.
        smoothing: s.
        columns: which of the classes a crop as a whole may have; None for all.

    Returns:
        Targets (B, classes) of the crops, or (B, columns), and (B, rows, columns, classes) of their places.

    Source: "All Tokens Matter" (Jiang et al., 2021); numbers held to those of the published code by
    tests/golden/token_targets.npz.
    """
    count, _, height, width = scores.shape
    scores = scores.float()
    maps_BCHW = scores.new_zeros(count, classes, height, width).scatter_(1, indices.long(), scores)
    corners = boxes.float() * boxes.new_tensor([width, height, width, height], dtype=torch.float32) - 0.5
    numbered = torch.cat([torch.arange(count, device=corners.device)[:, None].float(), corners], 1)

    def target(maps: Tensor, size: tuple[int, int]) -> Tensor:
        soft = roi_align(maps, numbered, size).softmax(1)
        return soft * (1 - smoothing + smoothing / maps.shape[1]) + smoothing / maps.shape[1]

    whole = maps_BCHW if columns is None else maps_BCHW[:, columns].contiguous()
    return target(whole, (1, 1)).flatten(1), target(maps_BCHW, grid).permute(0, 2, 3, 1)


def affine(name: str, size: tuple[int, int], amount: float) -> tuple[float, ...] | None:
    """How an operation of timm's policies moves an image: where in it a point (x, y) of its result comes from.

    Args:
        name: of the operation.
        size: width and height of the image.
        amount: the operation's first argument: a factor, a share of a side, or degrees.

    Returns:
        a, b, c, d, e, f of (a x + b y + c, d x + e y + f), in pixels; None if nothing is moved.
    """
    width, height = size
    if name == "Rotate":
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
        x, y = width / 2, height / 2  # which stay where they are
        return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
    return {
        "ShearX": (1, amount, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, amount, 1, 0),
        "TranslateXRel": (1, 0, amount * width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, amount * height),
    }.get(name)


def moved(tokens: TokenMap, matrix: tuple[float, ...], size: tuple[int, int]) -> TokenMap:
    """A map moved as its image (width, height) was, by `affine`: nearest place, and score 0 from outside."""
    indices, scores = tokens
    rows, columns = scores.shape[1:]
    width, height = size
    a, b, c, d, e, f = matrix
    y, x = ((np.arange(rows) + 0.5) * height / rows)[:, None], (np.arange(columns) + 0.5) * width / columns
    column = np.floor((a * x + b * y + c) * columns / width).astype(int)
    row = np.floor((d * x + e * y + f) * rows / height).astype(int)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    row, column = row.clip(0, rows - 1), column.clip(0, columns - 1)
    return indices[:, row, column], scores[:, row, column] * inside


class Moving:
    """An operation of a policy, which writes down how it moved each image."""

    def __init__(self, name: str, function: Any, moves: list[tuple[float, ...]]) -> None:
        self.name, self.function, self.moves = name, function, moves

    def __call__(self, image: Image.Image, *amount: Any, **kwargs: Any) -> Image.Image:
        matrix = affine(self.name, image.size, *amount) if amount else None
        if matrix is not None:
            self.moves.append(matrix)
        return self.function(image, *amount, **kwargs)


class TokenTransform:
    """A sample of an image, its class and its map: to a tensor (C, H, W), and what `token_targets` needs.

    Flip, RandAugment, then crop, as published. The map is flipped with the image, and moved by what turns, shears and
    shifts it; colours and erasing concern the image alone. The target becomes the class, the map's indices and scores,
    and the box of the crop.

    Args:
        augmentation: what varies.
        side: of training images.
        preparation: of the run.

    Raises:
        UserError: `auto_augment` is no RandAugment policy.
    """

    def __init__(self, augmentation: Augmentation, side: int, preparation: Preparation) -> None:
        self.hflip = augmentation.hflip
        crops, self.augment, self.finish = training_transform(augmentation, side, preparation, separate=True)
        self.crop = crops.transforms[0]
        self.moves: list[tuple[float, ...]] = []
        if augmentation.auto_augment:
            policy = self.augment.transforms[0]
            if not isinstance(policy, RandAugment):
                raise UserError(f"auto_augment {augmentation.auto_augment}: token labels go with rand-… policies only")
            for operation in policy.ops:
                operation.aug_fn = Moving(operation.name, operation.aug_fn, self.moves)

    def __call__(self, sample: Sample) -> Sample:
        image, (label, tokens), _ = sample
        if random.random() < self.hflip:
            image = TF.hflip(image)
            tokens = tokens[0][..., ::-1], tokens[1][..., ::-1]
        self.moves.clear()
        image = self.augment(image)
        for matrix in self.moves:
            tokens = moved(tokens, matrix, image.size)
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        box = left / image.width, top / image.height, (left + width) / image.width, (top + height) / image.height
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        pixels = self.finish(TF.resized_crop(image, top, left, height, width, self.crop.size, mode))
        indices, scores = (torch.from_numpy(np.ascontiguousarray(array)) for array in tokens)
        return Sample(pixels, (label, indices, scores, torch.tensor(box)))


@dataclass(frozen=True)
class PairedTargets:
    """Each image's class index and its label map."""

    labels: Any
    tokens: TokenMaps

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, TokenMap]:
        return self.labels[index], self.tokens.read(index)
