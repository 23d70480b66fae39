"""How an image becomes the network's input: timm's transforms, from our options."""

from typing import Any

from timm.data import create_transform

from glmix.options import TrainOptions


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
    """Random crop, flip and the augmentations of `options`, then normalise; `separate` gives the three steps."""
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
