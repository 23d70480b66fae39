"""How an image becomes the network's input: timm's transforms, from our options."""

from typing import Any

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP

from glmix.errors import UserError
from glmix.options import TrainOptions


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """`ImageOps.posterize` that still gives a black image for 0 bits, as Pillow did when the recipes were made.

    timm's RandAugment asks for 0 bits at its largest magnitude, and newer versions of Pillow refuse.
    """
    return Image.new(image.mode, image.size) if bits < 1 else ImageOps.posterize(image, min(bits, 8))


NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize))


def evaluation_transform(image: dict[str, Any]) -> Any:
    """Resize, centre crop and normalise, by a checkpoint's `image` entry (timm's data configuration)."""
    return create_transform(
        tuple(image["input_size"]),
        interpolation=image["interpolation"],
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        crop_pct=image["crop_pct"],
    )


def training_transform(options: TrainOptions, image: dict[str, Any], separate: bool = False) -> Any:
    """Random crop, flip and the augmentations of `options`, then normalise; `separate` gives the three steps.

    Raises:
        UserError: timm knows no such `auto_augment`.
    """
    policy = (options.auto_augment or "").split("-")[0]
    if policy and policy not in ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a"):
        raise UserError(f"auto_augment {options.auto_augment}: no policy of timm; such as rand-m9-mstd0.5-inc1")
    return create_transform(
        options.image_size,
        is_training=True,
        separate=separate,
        scale=(options.crop_scale, 1.0),
        hflip=options.hflip,
        color_jitter=options.color_jitter,
        auto_augment=options.auto_augment,
        interpolation="random" if options.random_interpolation else image["interpolation"],
        mean=tuple(image["mean"]),
        std=tuple(image["std"]),
        re_prob=options.random_erasing,
        re_mode="pixel",
    )
