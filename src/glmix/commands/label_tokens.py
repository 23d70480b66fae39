"""`glmix label-tokens`."""

from pathlib import Path

from glmix.commands.common import pick_device, print_skipped
from glmix.data.sources import open_split
from glmix.errors import UserError
from glmix.files import check_folder
from glmix.ranges import Workers
from glmix.tasks.labelling import write_labels
from glmix.training.processes import join_processes


def label_tokens(
    teacher: str,
    data: str,
    out: str,
    top: int = 5,
    size: int = 0,
    weights: str = "",
    batch_size: int = 64,
    workers: Workers = -1,
    all_classes: bool = False,
    flip: bool = False,
) -> None:
    """Write what a teacher sees at every place of the training images; the same command goes on where it was stopped.

    Args:
        teacher: timm model (best one that averages places before its classifier), or run folder or file of ours.
        data: as for `glmix train`; its training images are labelled.
        out: folder of the labels.
        top: classes kept per place.
        size: side in pixels that images are squashed to for the teacher; 0 for its own.
        weights: file with the weights of a timm model; left out, timm downloads them.
        batch_size: images at a time.
        workers: processes that load images; -1 chooses.
        all_classes: keep all of the teacher's classes, for a model with a dense head of as many: they tell more of a
            place than the few of the data.
        flip: take the mean of what the teacher sees in an image and in its mirror image; twice the time.
    """
    for option, value, least in (("--top", top, 1), ("--batch-size", batch_size, 1), ("--size", size, 0)):
        if value < least:
            raise UserError(f"{option} {value}: at least {least}")
    check_folder("--out", out)
    processes = join_processes()
    source = open_split(data, "train")
    labels, skipped = write_labels(
        teacher, source, Path(out), pick_device(), top, size, weights, batch_size, workers, all_classes, flip, processes
    )
    if not processes.first:
        return
    print_skipped(skipped)
    rows, columns = labels.grid
    print(f"{len(source)} images, {rows} x {columns} places, top {labels.top} of {len(labels.classes)} classes")
    head = ""
    if labels.classes != source.classes:
        head = f" --model-args '{{dense_classes: {len(labels.classes)}}}'"
    print(
        f"next: glmix train --task token-label --model glnet_4g_tklb{head} --data {data} --token-labels {out} --ema 0"
    )
