"""`glmix convert`."""

from pathlib import Path
from typing import Literal

from glmix.errors import UserError
from glmix.models import load
from glmix.models.weights import write_checkpoint
from glmix.use.hub import write_hub_folder


def convert(
    source: str,
    target: str,
    to: Literal["file", "hub"] = "file",
    half: bool = False,
    license: str = "",  # noqa: A002  (the option's name)
    data: str = "",
) -> None:
    """A released `.pth` file (or any checkpoint) as a safetensors file of ours, or as a folder for the hub.

    Args:
        source: run folder, file (ours or a released one), folder of the hub's form, or model name.
        target: the safetensors file to write; with --to hub, the folder.
        to: file, or hub: a folder that timm, transformers and the Hugging Face hub know, with a model card.
        half: write float16, half the size.
        license: of the weights, for the card, as the hub spells it, such as mit.
        data: what the weights were trained on and its licence, in words, for the card.
    """
    if to == "file" and Path(target).suffix != ".safetensors":
        raise UserError(f"{target}: the name of the new file must end in .safetensors")
    if to == "file" and (license or data):
        raise UserError("--license and --data are told on the card of --to hub; leave them out")
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise UserError(f"{target}: the source itself; give the new file another name")
    model, described = load(source)
    tensors = (model.half() if half else model).state_dict()
    if to == "hub":
        if Path(target).is_file():
            raise UserError(f"{target}: a file; --to hub writes a folder")
        write_hub_folder(Path(target), model, described, tensors, license, data)
        print(f"{target}: {described.model}, {len(described.classes)} classes; read its README.md, then glmix push")
        return
    path = write_checkpoint(target, described, tensors)
    print(f"{path}: {described.model}, {len(described.classes)} classes")
