"""What several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from glmix.data.pictures import LISTED, open_pictures
from glmix.data.samples import Skipped, Source
from glmix.errors import UserError
from glmix.export.files import is_exported, open_exported
from glmix.models import GLNet, backbone_of, load, network_of
from glmix.models.description import Description
from glmix.models.fold import optimize_for_inference
from glmix.models.merging import AUTO
from glmix.models.weights import fingerprint
from glmix.training.grids import finest_places
from glmix.training.processes import Processes


def pick_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pictures_for(names: Sequence[str], processes: Processes) -> Source:
    """`open_pictures`, of which each process takes its share.

    Raises:
        UserError: as there; or several processes would read one standard input.
    """
    if processes.count > 1 and LISTED in names:
        raise UserError(f"{LISTED}: several processes have one standard input; give a file of the names instead")
    return open_pictures(names)


def check_apart(out: str, sources: Sequence[str]) -> None:
    """Raise a UserError where the file to write is one of those to read."""
    place = Path(out)
    if out and place.exists() and any(Path(name).exists() and place.samefile(name) for name in sources):
        raise UserError(f"--out {out}: one of the sources, which it would replace; give it another name")


def check_counts(limit: int, batch_size: int) -> None:
    """Raise a UserError if there can be no such numbers of images."""
    for option, value, none in (("--limit", limit, "all"), ("--batch-size", batch_size, "that of the run")):
        if value < 0:
            raise UserError(f"{option} {value}: at least 1, or 0 for {none}")


def check_not_empty(option: str, values: Sequence[Any] | None) -> None:
    """Raise a UserError of a list that was given and has nothing in it."""
    if values is not None and not len(values):
        raise UserError(f"{option} []: an empty list; leave it out for the usual one")


def print_skipped(skipped: Sequence[Skipped]) -> None:
    """Names and reasons of what was left out, if anything was."""
    if skipped:
        print(f"skipped {len(skipped)} unusable images:", *skipped, sep="\n  ")


def load_for_slots(checkpoint: str, image_size: int = 0, fast: bool = False) -> tuple[GLNet, Description]:
    """As `load_with_slots`, the GLNet alone."""
    _, net, described = load_with_slots(checkpoint, image_size, fast)
    return net, described


def load_with_slots(checkpoint: str, image_size: int = 0, fast: bool = False) -> tuple[Any, GLNet, Description]:
    """As `load_for_images`, and of the model, which may be a head on it, the GLNet that the slots are in.

    Raises:
        UserError: the network has no slots.
    """
    if is_exported(checkpoint):
        raise UserError(f"{checkpoint}: an exported file shows no slots; name the checkpoint that it was made of")
    model, described = load_for_images(checkpoint, image_size, fast)
    net = network_of(model)
    if not isinstance(net, GLNet) or not net.slot_mixers():
        raise UserError(f"{checkpoint}: {described.model} as it was built has no GLMix blocks, so no slots to look at")
    return model, net, described


def load_for_images(checkpoint: str, image_size: int = 0, fast: bool = False) -> tuple[Any, Description]:
    """Model on its device and description of a checkpoint or an exported file.

    Args:
        checkpoint: as for `load`, or what `glmix export` wrote.
        image_size: side at which images are prepared; 0 for that of the checkpoint.
        fast: fold the network.
    """
    model: Any
    if is_exported(checkpoint):
        if fast:
            raise UserError(f"--fast: {checkpoint} is exported, and folded already; leave it out")
        model = open_exported(checkpoint)
        described = model.terms.description
    else:
        model, described = load(checkpoint)
    described.preparation = described.prepared.checked()
    if image_size:
        described.preparation = described.preparation.at(image_size)
    return folded(model.to(pick_device())) if fast else model.to(pick_device()), described


def mark_of(model: Any, checkpoint: str) -> str:
    """A checksum of weights: of a model's own, or of an exported file."""
    return fingerprint(model) if not is_exported(checkpoint) else f"{crc32(Path(checkpoint).read_bytes()):08x}"


def folded(model: Any) -> Any:
    """`model` as `optimize_for_inference` makes it.

    Raises:
        UserError: it is no GLNet.
    """
    try:
        return optimize_for_inference(model)
    except ValueError as error:
        raise UserError(f"--fast: {error}") from error


def set_grid(model: Any, slot_grid: tuple[int, int], described: Description) -> None:
    """Let the slots of `model` be pooled from another grid, as `--slot-grid` has it.

    Raises:
        UserError: it cannot be, or has more rows or columns than the finest map of images as they are prepared.
    """
    try:
        net = backbone_of(model)
        rows, columns = slot_grid
        net.set_slot_grid((rows, columns))
    except ValueError as error:
        raise UserError(f"--slot-grid: {error}") from error
    side = min(described.prepared.size)
    finest = max(1, finest_places(net, side))
    if max(slot_grid) > finest:
        raise UserError(
            f"--slot-grid {rows} {columns}: images of {side} px have {finest} x {finest} places in the finest map; "
            f"1 to {finest} rows and columns"
        )


def set_slots(model: Any, slots: str, option: str = "--slots") -> None:
    """Let images have as many slots as `auto`, a number or a threshold says; '' changes nothing.

    Raises:
        UserError: it is none of these, or the slots of this model cannot be merged so.
    """
    if not slots:
        return
    known = "auto, a number of slots such as 16, or a threshold with a point, such as 0.9 (0 to 1)"
    how: dict[str, Any] = {"threshold": AUTO}
    if slots != "auto":
        try:
            how = {"threshold": float(slots)} if "." in slots else {"budget": int(slots)}
        except ValueError as error:
            raise UserError(f"{option} {slots}: there are {known}") from error
    try:
        backbone_of(model).set_slot_merging(**how)
    except ValueError as error:
        raise UserError(f"{option} {slots}: {error}") from error
