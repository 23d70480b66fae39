"""Predictions of any task for many images, as rows of one table."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from glmix.data.images import BadImage, full_size
from glmix.data.loading import Batch
from glmix.data.samples import Sample, Source, spread
from glmix.files import plain_name, readable, written_whole
from glmix.journal import Journal
from glmix.models.description import Description
from glmix.training.task import Task
from glmix.use.sheets import MOST, Cell, draw_sheet, thumbnail
from glmix.use.streams import Stream, usual_batch
from glmix.use.tables import write_table

LONGEST = 200  # bytes of the names of pictures; file systems take 255


def predicting(
    task: Task, model: Any, description: Description, source: Source, device: torch.device, top: int,
    batch_size: int = 0, workers: int = -1, pictures: Path | None = None,
) -> Stream:  # fmt: skip
    """The stream of `top` answers an image; and into the folder `pictures`, what the task draws of each."""
    model = model.eval().to(device).to(memory_format=torch.channels_last)

    place = {name: i for i, name in enumerate(source.files)} if pictures else {}
    stems = different_stems(source.files) if pictures else []

    def answer(batch: Batch) -> list[Any]:
        outputs = task.forward(model, batch)
        if pictures and task.draw:
            for name, output in zip(batch.names, outputs, strict=True):
                picture = source.pictures[place[name]]
                for kind, drawn in task.draw(picture, output, description).items():
                    with written_whole(pictures / f"{stems[place[name]]}.{kind}.png") as file:
                        drawn.save(file, "PNG")
        return task.decode(outputs, batch, description, top)

    preparation = description.prepared
    size = batch_size or usual_batch(preparation)
    return Stream(source, task.evaluation(preparation), task.collate, answer, device, size, workers)


def found_in(task: Task, model: Any, description: Description, photo: Image.Image) -> Image.Image:
    """A photo with what `model` finds drawn into it, of a task that draws."""
    sample = task.evaluation(description.prepared)(Sample(photo, None))
    batch = task.collate([(sample, [])]).to(next(model.parameters()).device)
    with torch.inference_mode():
        outputs = task.forward(model.eval(), batch)
    assert task.draw is not None
    return next(iter(task.draw(photo, outputs[0], description).values()))


def different_stems(names: Sequence[str]) -> list[str]:
    """Names of new files for those of `names`, without ending; numbered where several are called the same."""
    taken: Counter[str] = Counter()
    stems = []
    for name in names:
        stem = plain_name(Path(name).stem, LONGEST)
        taken[stem] += 1
        stems.append(stem if taken[stem] == 1 else f"{stem}-{taken[stem]}")
    return stems


def rows_of(task: Task, name: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an image: one for each answer, one with the reason where it cannot be read, one where nothing is found."""
    path = {"path": readable(name)}
    if "error" in record:
        return [path | {"error": readable(record["error"])}]
    found = [path | row | {"rank": rank} for rank, row in enumerate(task.rows(record["answer"]), 1)]
    return found or [path]


def write_predictions(task: Task, source: Source, journal: Journal, out: Path) -> int:
    """The table of all that a journal holds, whole or not there; the number of images that could not be used."""
    columns = {"path": str, **task.columns, "rank": int, "error": str}
    failed = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for number, record in journal.merged():
            failed += "error" in record
            yield from (
                {name: row.get(name) for name in columns} for row in rows_of(task, source.files[number], record)
            )

    write_table(out, columns, rows())
    return failed


def on_sheet(source: Source) -> set[int]:
    """The images that a sheet shows: at most `MOST`, spread over all."""
    return set(spread(len(source), MOST))


def draw_predictions(task: Task, source: Source, shown: dict[int, dict[str, Any]], path: Path) -> None:
    """A contact sheet of the images `shown`, with their answers in words, and the boxes that these count."""
    draw_sheet([cell for number in sorted(shown) for cell in cell_of(task, source, number, shown[number])], path)


def cell_of(task: Task, source: Source, number: int, record: dict[str, Any]) -> list[Cell]:
    """An image with its name, its answers in words, and their boxes; none of one that cannot be read."""
    if "error" in record:
        return []
    try:
        picture = source.read(number).image
    except BadImage:  # since then
        return []
    width, height = full_size(picture)
    rows = [r for r in task.rows(record["answer"]) if r.get("x") is not None and r["probability"] >= task.sure]
    boxes = [(row["x"] / width, row["y"] / height, row["width"] / width, row["height"] / height) for row in rows]
    return [Cell(thumbnail(picture), [source.files[number], task.tell(record["answer"])], boxes)]
