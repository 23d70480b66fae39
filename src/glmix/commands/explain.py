"""`glmix explain`."""

from pathlib import Path

import torch
from PIL import Image

from glmix.commands.common import load_for_images, prepare_images
from glmix.errors import UserError
from glmix.models import SHIPPED
from glmix.models.slot_maps import slot_maps
from glmix.tasks.explain import plot_slots


def explain(
    images: list[str],
    out: str,
    checkpoint: str = SHIPPED,
    block: int = -1,
    slots: int = 4,
    image_size: int = 0,
    normalize: bool = False,
) -> None:
    """Pictures of the slots: the input, the assignment maps of a block, and the slots that represent them.

    Args:
        images: image files.
        out: folder for the pictures.
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        block: which GLMix block, counted from 0; -1 for the last.
        slots: number of representative slots.
        image_size: side of the images; 0 for that of the checkpoint.
        normalize: give every map a scale of its own.
    """
    model, described, transform = load_for_images(checkpoint, image_size)
    blocks = list(model.slot_mixers())
    if not -len(blocks) <= block < len(blocks):
        listed = ", ".join(f"{i} ({name})" for i, name in enumerate(blocks))
        raise UserError(f"no GLMix block {block}; this model has {listed}")
    if slots < 1:
        raise UserError(f"--slots {slots}: at least one")
    names, tensors, skipped = prepare_images(images, transform)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    mean, std = (torch.tensor(described.image[k])[:, None, None] for k in ("mean", "std"))
    for name, tensor in zip(names, tensors, strict=True):
        maps = slot_maps(model, tensor[None])[block]
        pixels = ((tensor * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        picture = folder / f"{Path(name).stem}.{maps.block.replace('.blocks', '').replace('stages.', 'block-')}.png"
        plot_slots(Image.fromarray(pixels), maps, count=slots, normalize=normalize).savefig(picture)
        print(picture)
    for reason in skipped:
        print(f"skipped {reason}")
    if not names:
        raise UserError("none of the images could be read")
