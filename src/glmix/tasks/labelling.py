"""Writing token labels: what a teacher sees at every place of the training images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from glmix.console import progress
from glmix.data.loading import Item, OfImage, Prepared, default_workers
from glmix.data.samples import Skipped, Source
from glmix.data.token_labels import TokenLabels, read_header
from glmix.errors import UserError
from glmix.models.teacher import DenseTeacher, class_columns, load_teacher
from glmix.models.weights import fingerprint
from glmix.training.processes import Processes, gathered

SHARD = 2048  # images per file: what a kill can cost


def write_labels(
    teacher: str,
    source: Source,
    out: Path,
    device: torch.device,
    top: int = 5,
    size: int = 0,
    weights: str = "",
    batch_size: int = 64,
    workers: int = -1,
    all_classes: bool = False,
    flip: bool = False,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
) -> tuple[TokenLabels, list[Skipped]]:
    """Write the labels of all images of a source; shards that are whole already are kept.

    Args:
        teacher, weights: as for `load_teacher`.
        source: training images.
        out: folder of the labels.
        device: where the teacher runs.
        top: classes kept per place.
        size: side in pixels that images are squashed to for the teacher; 0 for its own.
        batch_size: images at a time.
        workers: processes that load images; -1 chooses.
        all_classes: keep the best of all of the teacher's classes, not of the data's alone.
        flip: take the mean with the scores of the mirrored image.
        processes: that share the work, each its shards.

    Raises:
        UserError: the teacher cannot label these images, or `out` holds labels of another teacher or of other images.
    """
    model, names, preparation = load_teacher(teacher, weights)
    if not hasattr(model, "num_classes"):
        raise UserError(f"{teacher}: {type(model).__name__}, which tells no class of places; a teacher is a classifier")
    columns = class_columns(teacher, names, model.num_classes, source.classes)
    classes_kept = source.classes
    if all_classes:
        classes_kept = names or source.classes
        columns = list(range(model.num_classes))
    side = size or preparation.size[0]
    dense = DenseTeacher(teacher, model, columns, side).to(device)
    name = f"{teacher} {fingerprint(model)}"  # other weights under the same name are another teacher
    name += " and mirrored" if flip else ""
    header = (name, side, classes_kept, source.digest(), len(source), dense.grid, min(top, len(columns)))
    begun = read_header(out)
    labels = TokenLabels(out, *header, shard=begun.shard if begun else SHARD)
    if begun and begun != labels:
        raise UserError(f"{out}: has labels of another teacher, size, top or other images; choose another --out")
    processes.wait()  # all have looked before one writes
    if processes.first:
        labels.write_header()
    processes.wait()
    prepared = Prepared(source, OfImage(replace(preparation, size=(side, side), resize="squash", crop=1.0)))
    skipped: list[Skipped] = []
    for number in range(processes.rank, len(labels.shards), processes.count):
        if labels.whole_scores(number) is not None:
            continue
        indices = labels.indices(number)
        classes, scores = np.zeros((2, len(indices), *labels.grid, labels.top), np.float32)
        loader = DataLoader(
            prepared,
            batch_size,
            sampler=[(0, index, 0) for index in indices],
            num_workers=default_workers() if workers < 0 else workers,
            collate_fn=list,
        )
        items: list[Item]
        for start, items in zip(range(0, len(indices), batch_size), loader, strict=True):
            skipped += [found for _, names in items for found in names]
            images = {start + i: sample.image for i, (sample, _) in enumerate(items) if sample is not None}
            if images:
                pixels = torch.stack(list(images.values()))
                found = dense.label(pixels)
                if flip:
                    found = (found + dense.label(pixels.flip(3)).flip(2)) / 2
                best = found.topk(labels.top)
                if not best.values.isfinite().all():
                    raise UserError(f"{teacher}: its scores are not finite; are these weights of this model?")
                at = list(images)
                classes[at], scores[at] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            progress(indices.start + start + len(items), len(source), "images")
        labels.write(number, classes, scores)
    return labels, [found for part in gathered(skipped) for found in part]
