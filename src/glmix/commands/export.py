"""`glmix export`."""

from pathlib import Path
from typing import Literal

import torch

from glmix.commands.common import set_slots
from glmix.commands.eval import held_out, measured
from glmix.data.loading import default_workers
from glmix.data.samples import spread
from glmix.errors import UserError
from glmix.export.files import SUFFIXES, Terms, open_exported
from glmix.export.write import static as of_one_size
from glmix.export.write import write
from glmix.models import SHIPPED, load
from glmix.ranges import PositiveInt, SideOrZero
from glmix.tasks import task_named
from glmix.training.processes import join_processes

EXPORTED = ("classify", "token-label", "segment", "detect")


def export(
    file: str,
    checkpoint: str = SHIPPED,
    format: Literal["onnx", "openvino", "torch", ""] = "",  # noqa: A002  (the option's name)
    static: bool = False,
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    image_size: SideOrZero = 0,
    slots: str = "",
    data: str = "",
    calibrate: PositiveInt = 300,
) -> None:
    """A model as a file for an engine, from the folded network, checked against it.

    Args:
        file: to write: .onnx, .xml (OpenVINO; its weights, .bin, come beside it) or .pt2 (PyTorch).
        checkpoint: run folder, file (ours or a released one) or model name; left out, the weights that ship.
        format: onnx, openvino or torch; left out, what the file's ending says.
        static: for one image at a time, of one size: faster, above all in OpenVINO. A detector's file always is.
        precision: fp32; bf16 (OpenVINO, PyTorch), for hardware that computes in it; int8 (OpenVINO).
        image_size: side of the images; 0 for that of the checkpoint.
        slots: how many slots every image has, a number such as 16, to which alike ones are merged; left out, all of the grid.
        data: for int8: as for `glmix train`; its training images give the ranges, its validation images the accuracy.
        calibrate: for int8: how many images give the ranges.
    """
    path = Path(file)
    format = format or SUFFIXES.get(path.suffix, "")  # type: ignore[assignment]  # noqa: A001
    if not format:
        raise UserError(f"{file}: ends in none of {', '.join(SUFFIXES)}, and no --format is given")
    if (precision == "int8") != bool(data):
        raise UserError(f"--data: {'with --precision int8 alone' if data else 'int8 needs images, as glmix train has'}")
    model, described = load(checkpoint)
    if described.task not in EXPORTED:
        raise UserError(
            f"{checkpoint}: a model for {described.task}, which cannot be exported; those for {', '.join(EXPORTED)} can"
        )
    task = task_named(described.task)
    if image_size:
        described.preparation = described.prepared.at(image_size)
    if slots:
        if not slots.lstrip("-").isdigit():
            raise UserError(f"--slots {slots}: a file has the same number of slots for every image, such as 16")
        set_slots(model, slots)
        described.info = described.info | {"slots_of_an_image": int(slots)}
    terms = Terms(described, format, precision)
    if static or terms.detects:
        terms = of_one_size(terms)
        described = terms.description
    calibration: list[torch.Tensor] = []
    if data:
        source = task.open(data).split("train")
        chosen = source.take(spread(len(source), min(calibrate, len(source))))
        calibration = [described.prepared(chosen.read(i).image)[None] for i in range(len(chosen))]
    for line in write(model, terms, path, calibration):
        print(line)
    takes = "one image of {} x {}".format(*terms.size) if terms.size else "any size and batch"
    print(f"{path}: {described.model}, {precision}, {takes}" + (f", {slots} slots an image" if slots else ""))
    if data:
        source = task.align(held_out(task.open(data), described), described, data)
        for what, network in (("before", model), ("after", open_exported(path))):
            metrics = task.metrics(described)
            scores, used, _ = measured(
                task, network, described, metrics, source, 0, default_workers(), join_processes()
            )
            print(f"{what}: {task.describe(scores)} on {used} images")
