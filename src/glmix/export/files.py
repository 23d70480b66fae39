"""Exported files in use: what they say of themselves, and their engines as networks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmix.errors import UserError, needs
from glmix.models.description import Description

FORMAT = "glmix export 1"
KEY = "glmix"  # of the metadata
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}  # and the format that has it

Run = Callable[[np.ndarray], Any]  # images (B, C, H, W) to outputs, both float32; of a detector to those of `DETECTED`
DETECTED = ("boxes", "scores", "labels", "masks")  # outputs of a detector's file; masks of Mask R-CNN alone


@dataclass
class Terms:
    """What a file takes and is.

    Attributes:
        description: of the network, as in a checkpoint: task, classes, preparation.
        format: onnx, openvino or torch.
        precision: fp32, bf16 or int8.
        size: height and width that it takes; None for any from 32 up.
        batch: images at a time; 0 for any.
    """

    description: Description
    format: str
    precision: str = "fp32"
    size: tuple[int, int] | None = None
    batch: int = 0

    @property
    def detects(self) -> bool:
        """Whether the outputs are those of a detector, `DETECTED`, as many as there are objects."""
        return self.description.task == "detect"

    def header(self) -> str:
        """As text, for the file's metadata."""
        plain = {"format": FORMAT, "engine": self.format, "precision": self.precision, "size": self.size}
        return json.dumps(plain | {"batch": self.batch, "description": self.description.header()})

    @classmethod
    def read(cls, path: Path, text: str | None) -> "Terms":
        """From a file's metadata.

        Raises:
            UserError: it was not written by `glmix export`, or by another version.
        """
        try:
            content = json.loads(text or "")
            version = content.get("format")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: no file of `glmix export`: its metadata says nothing of a model") from error
        if version != FORMAT:
            raise UserError(f"{path}: exported by another version ({version}, not {FORMAT}); export it again")
        size = tuple(content["size"]) if content["size"] else None
        described = Description.of_header(content["description"])
        return cls(described, content["engine"], content["precision"], size, content["batch"])


class Exported(nn.Module):
    """An exported file as a network: images (B, C, H, W) to outputs, by the engine of its format, on the CPU.

    Args:
        path: for messages.
        terms: what the file takes.
        run: the engine.
    """

    def __init__(self, path: Path, terms: Terms, run: Run) -> None:
        super().__init__()
        self.path, self.terms, self.run = path, terms, run

    def forward(self, images: Tensor, sizes: Any = None) -> Any:
        """What the file computes; of a detector a list of what is found in each image, whose `sizes` must be the whole.

        Raises:
            UserError: a size that the file does not take.
        """
        size, wanted = tuple(images.shape[2:]), self.terms.size
        if wanted and size != wanted:
            raise UserError(
                f"{self.path}: takes images of {wanted[0]} x {wanted[1]} alone, not {size[0]} x {size[1]}; "
                "export without --static for any size"
            )
        if min(size) < 32:
            raise UserError(f"{self.path}: images of {size[0]} x {size[1]} are below 32, the network's stride")
        plain = images.detach().float().cpu().contiguous().numpy()
        if self.terms.detects:
            every = (self.run(plain[i : i + 1]) for i in range(len(plain)))
            return [{k: torch.from_numpy(v) for k, v in zip(DETECTED, found, strict=False)} for found in every]
        parts = [plain] if not self.terms.batch else [plain[i : i + 1] for i in range(len(plain))]
        return torch.from_numpy(np.concatenate([self.run(part) for part in parts])).to(images.device)


def is_exported(source: str | Path) -> bool:
    """Whether a name is that of an exported file."""
    return Path(source).suffix in SUFFIXES


def open_exported(path: str | Path, threads: int = 0) -> Exported:
    """The network of an exported file.

    Args:
        path: written by `glmix export`.
        threads: of the engine; 0 for its own choice.

    Raises:
        UserError: no such file, its engine is not installed, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    opened = {"onnx": _onnxruntime, "openvino": _openvino, "torch": _torch}[SUFFIXES[path.suffix]]
    try:
        terms, run = opened(path, threads)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # every way in which an engine can refuse a file
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path}: damaged, or no model of its ending ({reason[0][:120] if reason else error!r})"
        ) from error
    return Exported(path, terms, run)


def _onnxruntime(path: Path, threads: int) -> tuple[Terms, Run]:
    with needs("export"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    terms = Terms.read(path, session.get_modelmeta().custom_metadata_map.get(KEY))
    return terms, lambda images: session.run(None, {name: images})[slice(None) if terms.detects else 0]


def _openvino(path: Path, threads: int) -> tuple[Terms, Run]:
    with needs("export"):
        import openvino
    if not path.with_suffix(".bin").is_file():
        raise UserError(f"{path}: its weights, {path.with_suffix('.bin').name}, are not beside it")
    core = openvino.Core()
    model = core.read_model(path)
    said = model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None
    terms = Terms.read(path, said)
    return terms, openvino_run(model, terms.precision, threads)


def openvino_run(model: Any, precision: str, threads: int = 0) -> Run:
    """OpenVINO's model, compiled for this CPU."""
    import openvino

    hint = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}[precision]
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda images: request.infer([images])[0].copy()


def _torch(path: Path, threads: int) -> tuple[Terms, Run]:
    extra = {KEY: ""}
    program = torch.export.load(str(path), extra_files=extra)
    terms = Terms.read(path, extra[KEY])
    module = program.module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return terms, run
