"""How a picture becomes the network's input, and back: one way for training, evaluation, prediction and figures."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.transforms import Compose, Grayscale, InterpolationMode, Normalize
from torchvision.transforms import functional as TF

from glmix.errors import UserError
from glmix.ranges import NonNegativeFloat, Share, ShareAboveZero

POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")  # of timm, by the word they begin with
LEAST_SIDE = 32  # pixels: the network's stride


@dataclass(frozen=True)
class Preparation:
    """How images are prepared for a network; part of every checkpoint.

    Attributes:
        size: height and width of the input, in pixels.
        channels: 3 for RGB, 1 for grey.
        resize: 'crop' takes the middle, 'squash' the whole image whatever its aspect, 'short' the whole image at its
            aspect: the shorter side becomes that of `size`, unless the longer one would be above the longer of `size`.
        crop: share of the shorter side that 'crop' keeps.
        interpolation: timm's name of it, such as 'bicubic'.
        mean, std: of each channel, in shares of the largest value.
    """

    size: tuple[int, int] = (224, 224)
    channels: int = 3
    resize: str = "crop"
    crop: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Preparation":
        """From timm's data configuration (or the `image` entry of older checkpoints); what it lacks is as usual."""
        known: dict[str, Any] = {}
        if "input_size" in config:
            channels, *size = config["input_size"]
            known.update(channels=channels, size=tuple(size))
        known.update({k: tuple(config[k]) for k in ("mean", "std") if k in config})
        for key, name in (("interpolation", "interpolation"), ("crop_pct", "crop"), ("crop_mode", "resize")):
            if key in config:
                known[name] = config[key]
        if known.get("resize") not in ("squash", "crop"):  # of timm's modes: the middle, unless all is squashed
            known.pop("resize", None)
        return cls(**known)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Preparation":
        """From `asdict` of one, as a header holds it."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        return cls(**known)

    def asdict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def at(self, side: int) -> "Preparation":
        """The same for square images of `side` pixels; of images at their aspect for a shorter side of so many.

        Raises:
            UserError: a side below the network's stride.
        """
        if side < LEAST_SIDE:
            raise UserError(f"images of {side} px are below {LEAST_SIDE}, the network's stride")
        longest = round(side * max(self.size) / min(self.size)) if self.resize == "short" else side
        return replace(self, size=(side, longest))

    def checked(self) -> "Preparation":
        """Itself.

        Raises:
            UserError: pictures are not read in so many channels.
        """
        if self.channels not in (1, 3):
            raise UserError(
                f"a network for images of {self.channels} channels (in_chans); pictures are read as grey, 1, or RGB, 3"
            )
        return self

    def tensor(self, picture: Image.Image) -> Tensor:
        """A picture of the right size as the network's input (C, H, W): of its channels, normalised."""
        mode = "L" if self.channels == 1 else "RGB"
        pixels = TF.pil_to_tensor(picture if picture.mode == mode else picture.convert(mode)).contiguous()
        return TF.normalize(pixels.float().div_(255), *self.statistics, inplace=True)

    def picture(self, tensor: Tensor) -> Image.Image:
        """What `tensor` made (C, H, W), as a picture again."""
        mean, std = (torch.tensor(values)[:, None, None] for values in self.statistics)
        pixels = (255 * (tensor.detach().float().cpu() * std + mean)).round().clamp(0, 255).byte()
        return TF.to_pil_image(pixels).convert("RGB")

    @cached_property
    def fit(self) -> Callable[[Image.Image], Image.Image]:
        """Brings a picture of any size to `size`: squashed, or its middle; timm's transforms for evaluation."""
        if self.resize == "short":
            return self._at_its_aspect
        mode = "squash" if self.resize == "squash" else "center"
        *resizing, _, _ = create_transform(
            self.size, interpolation=self.interpolation, crop_pct=self.crop, crop_mode=mode
        ).transforms  # without the last two, to a tensor and its normalisation
        return Compose(resizing)

    def _at_its_aspect(self, picture: Image.Image) -> Image.Image:
        """Truncated as torchvision's RandomShortestSize does; but of the thinnest picture a pixel is left."""
        factor = self.factor(picture.size)
        size = [max(1, int(side * factor)) for side in (picture.height, picture.width)]
        return TF.resize(picture, size, InterpolationMode(self.interpolation))

    def factor(self, sides: tuple[int, int]) -> float:
        """What 'short' scales a picture of these sides by."""
        return min(min(self.size) / min(sides), max(self.size) / max(sides))

    @property
    def resampling(self) -> Image.Resampling:
        """Pillow's name of the interpolation."""
        return Image.Resampling[self.interpolation.upper()]

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture of any size as the network's input (C, H, W)."""
        return self.tensor(self.fit(picture))

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and std of as many channels as there are: those of grey are the means of RGB's."""
        mean, std = list(self.mean), list(self.std)
        if self.channels == 1 and len(mean) > 1:
            return [sum(mean) / len(mean)], [sum(std) / len(std)]
        return mean, std


@dataclass(kw_only=True)
class Augmentation:
    """How training images vary.

    Args:
        crop_scale: smallest share of the image that a random crop takes.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation changes (not with auto_augment).
        auto_augment: timm's policy, such as rand-m9-mstd0.5-inc1; none if left out.
        random_interpolation: bilinear or bicubic by chance.
        random_erasing: probability that a rectangle is erased.
    """

    crop_scale: ShareAboveZero = 0.25
    hflip: Share = 0.5
    color_jitter: NonNegativeFloat = 0.0
    auto_augment: str | None = None
    random_interpolation: bool = False
    random_erasing: Share = 0.0


def training_transform(augmentation: Augmentation, side: int, preparation: Preparation, separate: bool = False) -> Any:
    """Random crop, flip and the augmentations asked for, then normalise; `separate` gives the three steps of timm's.

    Raises:
        UserError: timm knows no such `auto_augment`.
    """
    a = augmentation
    try:
        if (a.auto_augment or POLICIES[0]).split("-")[0] not in POLICIES:
            raise ValueError("its name begins otherwise")
        transform = create_transform(
            side,
            is_training=True,
            separate=separate,
            scale=(a.crop_scale, 1.0),
            hflip=a.hflip,
            color_jitter=a.color_jitter,
            auto_augment=a.auto_augment,
            interpolation="random" if a.random_interpolation else preparation.interpolation,
            mean=preparation.mean,
            std=preparation.std,
            re_prob=a.random_erasing,
            re_mode="pixel",
        )
    except (ValueError, AssertionError, KeyError) as error:  # timm's ways to say that it cannot read a policy
        if not a.auto_augment:
            raise
        raise UserError(f"auto_augment {a.auto_augment}: no policy of timm; such as rand-m9-mstd0.5-inc1") from error
    steps = list(transform) if separate else [transform]
    for step in steps:
        for module in step.transforms:
            _keep_zero_bits(module)
    if preparation.channels == 1:
        _to_grey(steps[-1], preparation)
    return tuple(steps) if separate else steps[0]


def _to_grey(transform: Compose, preparation: Preparation) -> None:
    """Colours are changed in RGB; of what comes out, the grey becomes the tensor."""
    steps = transform.transforms
    place = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
    mean, std = preparation.statistics
    steps[place] = Normalize(mean, std)
    steps.insert(place - 1, Grayscale(1))


def _keep_zero_bits(augment: Any) -> None:
    """Let posterisation to 0 bits give a black picture, as Pillow did when the recipes were made.

    timm's policies ask for it at their largest magnitude, and newer versions of Pillow refuse.
    """
    groups = [getattr(augment, "ops", []), *getattr(augment, "policy", [])]
    for operation in (op for group in groups for op in group):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    return Image.new(picture.mode, picture.size) if bits < 1 else ImageOps.posterize(picture, min(bits, 8))
