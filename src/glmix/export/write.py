"""Writing a network as a file for an engine; a file that does not compute what the network does is not kept."""

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glmix.errors import UserError, needs
from glmix.export.files import DETECTED, KEY, SUFFIXES, Exported, Terms, open_exported
from glmix.export.graph import for_engine
from glmix.models.fold import optimize_for_inference
from glmix.models.heads.detect import DETECTIONS, MaskRCNN

# largest difference of the logits, as a share of their norm; what rounding does to networks as they are trained is a third
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.6}
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}
SURE = 0.3  # score from which the boxes of a detector are compared: below, the order of two may be chance
FEWEST = 32  # images that ranges of activations are taken from


class Rounded(nn.Module):
    """A network in bfloat16 that takes and gives float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.bfloat16()).float()


def write(model: nn.Module, terms: Terms, path: Path, calibration: Sequence[Tensor] = ()) -> list[str]:
    """Write `model` as the file that `terms` describe, and check it at two sizes and batches (one, of a static one).

    Args:
        model: in evaluation mode, on the CPU; images (B, C, H, W) to logits (B, classes), of segmenters (B, classes, H, W).
        terms: format and precision; with a size, for that and one image at a time alone.
        path: of the file; OpenVINO's weights come beside it, as `.bin`.
        calibration: images (1, C, H, W) for int8.

    Returns:
        What the checks found, a line each.

    Raises:
        UserError: the format has no such precision, its writer is not installed, the file cannot be written, or the file
            computes something else; then there is no file.
    """
    if SUFFIXES.get(path.suffix) != terms.format:
        ending = next(suffix for suffix, name in SUFFIXES.items() if name == terms.format)
        raise UserError(f"{path}: the name of a file for {terms.format} must end in {ending}")
    if terms.detects and terms.format != "onnx":
        raise UserError(
            f"{path}: a detector is exported to ONNX alone (.onnx), whose files may find as many objects as there are"
        )
    if terms.precision == "bf16" and terms.format == "onnx":
        raise UserError("--precision bf16: onnxruntime has none on a CPU; use --format openvino")
    if terms.precision == "int8" and terms.format != "openvino":
        raise UserError("--precision int8: for --format openvino alone")
    if terms.precision == "int8" and len(calibration) < FEWEST:
        raise UserError(f"--data: {len(calibration)} images; int8 takes its ranges from at least {FEWEST}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem[:40]}.") as folder:
            made = Path(folder) / path.name
            with quiet():
                WRITERS[terms.format](model, terms, made, calibration)
            found = (checked_detector if terms.detects else checked)(model, open_exported(made))
            for file in sorted(Path(folder).iterdir()):  # the weights, .bin, before what names them, .xml
                shutil.move(file, path.parent / file.name)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free space, or choose another place") from error
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters tell of their progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def example(terms: Terms, batch: int, more: int = 0, seed: int = 0) -> Tensor:
    """Images of the size that the checkpoint prepares, or `more` pixels; the same ones each time.

    Of a single place of the last grid, 32 px, a trace would take its number for a constant: free sizes begin above it.
    """
    preparation = terms.description.prepared
    sides = (min(preparation.size),) * 2 if preparation.resize == "short" else preparation.size
    height, width = terms.size or (max(side, 64) for side in sides)
    generator = torch.Generator().manual_seed(batch + more + seed)
    coarse = torch.randn(batch, preparation.channels, height // 16, width // 16, generator=generator)
    size = (height + more, width + more)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)


def agreement(given: Tensor, wanted: Tensor) -> str:
    """On how many images, or pixels, the likeliest class is the same."""
    same = given.argmax(1) == wanted.argmax(1)
    return f"top-1 agrees on {int(same.sum())} of {same.numel()}" + (" pixels" if same.ndim > 1 else "")


class Found(nn.Module):
    """A detector on one image (1, C, H, W): what it finds as a tuple, in the order of `DETECTED`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.model(x)
        return tuple(found[name] for name in DETECTED if name in found)


def checked_detector(model: nn.Module, exported: Exported) -> list[str]:
    """As `checked`, of the scores of all that is found, and of the boxes of what is surely found.

    Raises:
        UserError: they differ by more than rounding.
    """
    lines = []
    for number in range(1, 4):
        image = example(exported.terms, 1, seed=number)
        with torch.inference_mode():
            (wanted,) = model(image)
        (given,) = exported(image)
        scores = [nn.functional.pad(each["scores"], (0, DETECTIONS - len(each["scores"]))) for each in (given, wanted)]
        sure = int((wanted["scores"] > SURE).sum())
        apart = float((given["boxes"][:sure] - wanted["boxes"][:sure]).abs().max()) if sure else 0.0
        if not ((scores[0] - scores[1]).abs().max() < 1e-3 and apart < 0.5):
            raise UserError(f"{exported.path.name}: finds something else than the network; not kept")
        lines.append(f"image {number}: {len(given['scores'])} objects, boxes differ by at most {apart:.1e} pixels")
    return lines


def checked(model: nn.Module, exported: Exported) -> list[str]:
    """Compare an exported file with the network that it is of.

    Raises:
        UserError: it differs by more than rounding.
    """
    terms = exported.terms
    cases = [(1, 0), (4, 0)] if terms.size else [(1, 0), (3, 32)]
    found = []
    for batch, more in cases:
        images = example(terms, batch, more)
        with torch.inference_mode():
            wanted = model(images)
        given = exported(images)
        difference = float((given - wanted).norm() / wanted.norm())
        size = f"{batch} of {images.shape[2]} x {images.shape[3]}"
        largest = float((given - wanted).abs().max())
        if not difference <= TOLERANCE[terms.precision]:
            raise UserError(
                f"{exported.path.name}: computes something else than the network ({size}: logits differ by "
                f"{difference:.1%}); not kept"
            )
        found.append(f"{size}: logits differ by at most {largest:.1e}, {agreement(given, wanted)}")
    return found


def exported_program(model: nn.Module, terms: Terms) -> Any:
    """The folded network, traced by torch.export with free sizes, or with those of a static file."""
    try:
        folded = optimize_for_inference(model)
    except ValueError:  # a network of others, which is exported as it is
        folded = model
    graph = for_engine(folded, ENGINES[terms.format])
    if terms.precision == "bf16" and terms.format == "torch":
        graph = Rounded(graph)
    images = example(terms, terms.batch or 2)
    if terms.size:
        return torch.export.export(graph, (images,))
    height, width = (torch.export.Dim(name, min=33) for name in ("height", "width"))
    shapes = ({0: torch.export.Dim("batch"), 2: height, 3: width},)
    try:
        return torch.export.export(graph, (images,), dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        if folded is not model:
            raise
        raise UserError("this network does not take any size from 33 px on; export it with --static") from error


def _write_torch(model: nn.Module, terms: Terms, path: Path, calibration: Sequence[Tensor]) -> None:
    # what writes into files itself says of a full disk nothing that could be told from other errors
    buffer = io.BytesIO()
    torch.export.save(exported_program(model, terms), buffer, extra_files={KEY: terms.header()})
    path.write_bytes(buffer.getbuffer())


def _write_onnx(model: nn.Module, terms: Terms, path: Path, calibration: Sequence[Tensor]) -> None:
    with needs("export"):
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx needs it, and says so at length)
    if terms.detects:
        made = traced_detector(model, terms, path)
    else:
        program = torch.onnx.export(exported_program(model, terms), dynamo=True, verbose=False)
        assert program is not None
        made = program.model_proto
    onnx.helper.set_model_props(made, {KEY: terms.header()})
    path.write_bytes(made.SerializeToString())


def traced_detector(model: nn.Module, terms: Terms, path: Path) -> Any:
    """A detector as ONNX, traced: torch.export cannot follow outputs whose number hangs on what is seen."""
    import onnx

    outputs = [name for name in DETECTED if name != "masks" or isinstance(model, MaskRCNN)]
    free = {name: {0: "objects"} for name in outputs}
    graph = Found(optimize_for_inference(model)).eval()
    with torch.no_grad():
        torch.onnx.export(graph, (example(terms, 1),), path, dynamo=False, opset_version=17, input_names=["images"],
                          output_names=outputs, dynamic_axes=free)  # fmt: skip
    return onnx.load(path)


def _write_openvino(model: nn.Module, terms: Terms, path: Path, calibration: Sequence[Tensor]) -> None:
    with needs("export"):
        import openvino
    made = openvino.convert_model(exported_program(model, terms))
    if terms.precision == "int8":
        made = quantized(made, calibration)
    made.set_rt_info(terms.header(), KEY)
    try:
        openvino.save_model(made, path, compress_to_fp16=False)
    except RuntimeError as error:  # all that it says where the disk is full
        raise OSError(str(error).strip().splitlines()[-1]) from error


def quantized(model: Any, calibration: Sequence[Tensor]) -> Any:
    """OpenVINO's model with convolutions in int8, per channel; norms, GELU, softmax, slots and sums stay in float."""
    with needs("export"):
        import nncf
    spared = nncf.IgnoredScope(types=["MatMul", "Add", "Multiply", "ReduceMean", "Softmax", "Gelu"], validate=False)
    data = nncf.Dataset([image.numpy() for image in calibration])
    return nncf.quantize(
        model, data, preset=nncf.QuantizationPreset.MIXED, subset_size=len(calibration), ignored_scope=spared
    )


WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "openvino": _write_openvino}


def static(terms: Terms) -> Terms:
    """The terms of a file for one image at a time, of the size that the checkpoint prepares.

    What is prepared at its own aspect else, whole, is squashed to a square then, and for a detector to both of its sides.
    """
    described = terms.description
    preparation = described.prepared
    if described.task == "detect":  # at the aspect that most of its images have, and whole strides
        height, width = (-(-side // 32) * 32 for side in preparation.size)
        preparation = replace(preparation, size=(height, width), resize="squash")
    elif preparation.resize == "short":
        preparation = replace(preparation, size=(min(preparation.size),) * 2, resize="squash")
    height, width = preparation.size
    return replace(terms, description=replace(described, preparation=preparation), size=(height, width), batch=1)
