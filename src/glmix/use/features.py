"""Frozen features: pooled ones, means of a stage, and slots, which are vectors of an image's parts."""

import re
import zipfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmix.data.images import full_size
from glmix.data.loading import Batch, OfImage, Transform, stack
from glmix.data.prepare import Preparation
from glmix.data.samples import Sample, Source
from glmix.errors import UserError
from glmix.files import readable, written_whole
from glmix.journal import Journal
from glmix.models import GLNet
from glmix.models.slot_maps import slot_maps
from glmix.training.task import BOX
from glmix.use.streams import Stream, usual_batch
from glmix.use.tables import write_parquet

ENDINGS = (".parquet", ".npz")


def layer_of(net: Any, layer: str) -> Callable[[Tensor], Tensor]:
    """What gives features (B, D) of images: 'head' pools as before the classifier, 'stage2' is the mean of a stage's grid.

    Raises:
        UserError: there is no such layer, or the network is an exported file, which has logits alone.
    """
    if not hasattr(net, "forward_head"):
        raise UserError(
            f"{type(net).__name__.lower()} networks give answers alone; name the checkpoint with the features"
        )
    if layer == "head":

        def pooled(images: Tensor) -> Tensor:
            features = net.forward_head(net.forward_features(images), pre_logits=True)
            return features.mean((2, 3)) if features.ndim == 4 else features  # under a dense head nothing pools

        return pooled
    stage = re.fullmatch(r"stage(\d)", layer)
    count = len(net.feature_info)
    if not stage or int(stage[1]) >= count:
        raise UserError(f"--layer {layer}: there are head, {', '.join(f'stage{i}' for i in range(count))}")
    at = [int(stage[1])]
    return lambda images: net.forward_intermediates(images, indices=at, intermediates_only=True)[0].mean((2, 3))


def embedding(
    net: Any, preparation: Preparation, layer: str, source: Source, device: torch.device, batch_size: int = 0,
    workers: int = -1,
) -> Stream:  # fmt: skip
    """The stream of features (D,) an image, float32 arrays."""
    net = net.eval().to(device).to(memory_format=torch.channels_last)
    features = layer_of(net, layer)
    if preparation.resize == "short":  # of a dense task, where each picture keeps its aspect: none for batches
        preparation = replace(preparation, resize="squash", crop=1.0)

    def answer(batch: Batch) -> list[NDArray[np.float32]]:
        return list(features(batch.images.contiguous(memory_format=torch.channels_last)).float().cpu().numpy())

    size = batch_size or usual_batch(preparation)
    return Stream(source, OfImage(preparation), stack, answer, device, size, workers)


# --- slots


@dataclass(frozen=True)
class Whole:
    """Transform of a sample: the whole picture, whatever its aspect, so that slots of all of it come in batches.

    The target is the height and width of the file's picture.
    """

    preparation: Preparation

    def __call__(self, sample: Sample) -> Sample:
        width, height = full_size(sample.image)
        size = torch.tensor([height, width])
        return sample._replace(image=self.preparation(sample.image), target=size)


def slot_features(net: GLNet, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor]:
    """What each slot of a block gathered, (B, M, C), before it attends to others; and the assignment (B, M, h, w)."""
    mixer: Any = list(net.slot_mixers().values())[block]
    gathered: list[Tensor] = []
    attend = mixer.attend

    def keeping(slots_BMC: Tensor) -> Tensor:
        gathered.append(slots_BMC)
        return attend(slots_BMC)

    mixer.attend = keeping
    try:
        maps = slot_maps(net, images)[block]
    finally:
        del mixer.attend
    return gathered[0], maps.assignment


def regions_of(assignment: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where slots are the strongest: boxes (M, 4), x, y, width and height in shares of the sides, and areas (M,).

    Args:
        assignment: (M, h, w) of an image.

    Returns:
        Of a slot that is nowhere the strongest, NaN and 0.
    """
    slots, h, w = assignment.shape
    labels = assignment.argmax(0)
    boxes, areas = np.full((slots, 4), np.nan), np.zeros(slots)
    for slot in np.unique(labels):
        rows, columns = np.nonzero(labels == slot)
        x, y = columns.min(), rows.min()
        boxes[slot] = x / w, y / h, (columns.max() + 1 - x) / w, (rows.max() + 1 - y) / h
        areas[slot] = len(rows) / (h * w)
    return boxes, areas


def embedding_slots(
    net: GLNet, preparation: Preparation, block: int, source: Source, device: torch.device, batch_size: int = 0,
    workers: int = -1,
) -> Stream:  # fmt: skip
    """The stream of (features (M, C), boxes (M, 4) in pixels of the picture, areas (M,)) an image."""
    transform: Transform = Whole(replace(preparation, resize="squash", crop=1.0))

    def answer(batch: Batch) -> list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        features_BMC, assignment_BMhw = slot_features(net, batch.images, block)
        found = []
        for features, assignment, (height, width) in zip(
            features_BMC.float().cpu().numpy(),
            assignment_BMhw.float().cpu().numpy(),
            batch.targets.tolist(),
            strict=True,
        ):
            boxes, areas = regions_of(assignment)
            found.append((features, boxes * (width, height, width, height), areas))
        return found

    size = batch_size or usual_batch(preparation)
    return Stream(source, transform, stack, answer, device, size, workers)


# --- files


def as_text(stream: Stream) -> Stream:
    """The stream with arrays as text, as a journal holds them."""
    answer = stream.answer

    def encoded(batch: Batch) -> list[Any]:
        return [[pack(a) for a in found] if isinstance(found, tuple) else pack(found) for found in answer(batch)]

    return replace(stream, answer=encoded)


def pack(array: NDArray[Any]) -> list[Any]:
    """An array as plain data: shape and float32 values."""
    return [list(array.shape), b64encode(array.astype("<f4").tobytes()).decode()]


def unpack(packed: list[Any]) -> NDArray[np.float32]:
    shape, text = packed
    return np.frombuffer(b64decode(text), "<f4").reshape(shape)


def arrays_of(journal: Journal, source: Source) -> Iterator[tuple[str, list[NDArray[np.float32]]]]:
    """Name and arrays of each image that could be read."""
    for number, record in journal.merged():
        if "answer" in record:
            found = record["answer"]
            packed = found if isinstance(found[0][0], list) else [found]  # of slots there are three
            yield readable(source.files[number]), [unpack(array) for array in packed]


def write_features(journal: Journal, source: Source, out: Path) -> list[str]:
    """The file of all that a journal holds: parquet, a row an image (or slot), or .npz; and what could not be used."""
    failed = [f"{source.files[n]}: {record['error']}" for n, record in journal.merged() if "error" in record]
    _, first = next(arrays_of(journal, source))
    write = write_npz if out.suffix.lower() == ".npz" else write_rows
    write(journal, source, out, len(source) - len(failed), first)
    return failed


def write_rows(journal: Journal, source: Source, out: Path, count: int, first: list[NDArray[Any]]) -> None:
    """Parquet: path and features; of slots also the slot's number, its box and its area."""
    slots = len(first) > 1
    columns: dict[str, Any] = {"path": str}
    if slots:
        columns |= {"slot": int} | dict.fromkeys((*BOX, "area"), float)
    columns["features"] = first[0].shape[-1]

    def rows() -> Iterator[dict[str, Any]]:
        for path, arrays in arrays_of(journal, source):
            if not slots:
                yield {"path": path, "features": arrays[0]}
                continue
            for slot, (features, box, area) in enumerate(zip(*arrays, strict=True)):
                place = dict(zip(BOX, (None if np.isnan(v) else float(v) for v in box), strict=True))
                yield {"path": path, "slot": slot, **place, "area": float(area), "features": features}

    write_parquet(out, columns, rows())


def write_npz(journal: Journal, source: Source, out: Path, count: int, first: list[NDArray[Any]]) -> None:
    """`paths` (N,), `features` (N, D); of slots `features` (N, M, C), `boxes` (N, M, 4) and `areas` (N, M).

    Written piece by piece, so that memory does not grow with the number of images.
    """
    names = ("features", "boxes", "areas")[: len(first)]
    with written_whole(out) as file, zipfile.ZipFile(file, "w") as archive:

        def begin(name: str) -> Any:
            return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)

        with begin("paths") as entry:
            np.lib.format.write_array(
                entry, np.array([path for path, _ in arrays_of(journal, source)]), allow_pickle=False
            )
        for i, name in enumerate(names):
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, *first[i].shape)}
            with begin(name) as entry:
                np.lib.format.write_array_header_1_0(entry, header)
                for _, arrays in arrays_of(journal, source):
                    entry.write(arrays[i].tobytes())
