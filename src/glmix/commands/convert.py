"""`glmix convert`."""

from pathlib import Path

from glmix.errors import UserError
from glmix.models import load
from glmix.models.weights import write_checkpoint


def convert(source: str, target: str, half: bool = False) -> None:
    """A released `.pth` file (or any checkpoint) as a safetensors file of ours.

    Args:
        source: run folder, file (ours or a released one) or model name.
        target: the safetensors file to write.
        half: write float16, half the size.
    """
    if Path(target).suffix != ".safetensors":
        raise UserError(f"{target}: the name of the new file must end in .safetensors")
    model, described = load(source)
    path = write_checkpoint(target, described, (model.half() if half else model).state_dict())
    print(f"{path}: {described.model}, {len(described.classes)} classes")
