"""`glmix predict`."""

import json as json_module
from pathlib import Path
from typing import Any

from glmix.commands.common import check_apart, load_for_images, mark_of, pick_device, pictures_for
from glmix.data.images import full_size
from glmix.errors import UserError
from glmix.files import written_whole
from glmix.models import SHIPPED
from glmix.ranges import NonNegativeInt, Workers
from glmix.tasks import task_named
from glmix.training.processes import join_processes
from glmix.use.predictions import draw_predictions, on_sheet, predicting, write_predictions
from glmix.use.sheets import check_picture
from glmix.use.tables import check_ending


def predict(
    sources: list[str],
    checkpoint: str = SHIPPED,
    out: str = "",
    top: int | None = None,
    sheet: str = "",
    pictures: str = "",
    image_size: int = 0,
    fast: bool = False,
    batch_size: NonNegativeInt = 0,
    workers: Workers = -1,
    json: bool = False,
) -> int:
    """What a model sees in images; the same command goes on where it was cut.

    Exits with 1 where some of them could not be read.

    Args:
        sources: images, folders, patterns, tars, tables of paths, parquet, hf:OWNER/NAME, scenes; - for names on
            standard input.
        checkpoint: run folder, file (ours, a released one, or of `glmix export`) or model name; left out, the weights that
            ship.
        out: file for all answers instead of the terminal, .csv, .jsonl or .parquet: a row for each.
        top: answers per image at most; left out, three classes, or all objects.
        sheet: picture file for a contact sheet: images, spread over all, with their answers.
        pictures: folder for pictures of what was found, of segmenters and detectors; of the latter also predictions.json,
            in COCO's form and with the category ids of the data.
        image_size: side of the images; 0 for that of the checkpoint.
        fast: fold the network first (glmix.optimize_for_inference): worth it for many images.
        batch_size: images at a time; 0 chooses.
        workers: processes that load images; -1 chooses.
        json: print one JSON object per image instead of sentences.
    """
    if top is not None and top < 1:
        raise UserError(f"--top {top}: at least one")
    if out:
        check_ending(Path(out))
        if json:
            raise UserError("--json: what is printed; with --out, its ending says the format (.jsonl)")
    if sheet:
        check_picture("--sheet", Path(sheet))
    processes = join_processes()
    if processes.count > 1 and not out:
        raise UserError("several processes need --out, a file for all of their answers")
    check_apart(out, sources)
    source = pictures_for(sources, processes)
    model, described = load_for_images(checkpoint, image_size, fast)
    task = task_named(described.task)
    top = top or task.usual_top
    if pictures and task.draw is None:
        raise UserError(f"--pictures: nothing to draw; {checkpoint} is for {task.name}")
    drawn = Path(pictures) if pictures else None
    stream = predicting(task, model, described, source, pick_device(), top, batch_size, workers, drawn)
    wanted = on_sheet(source) if sheet else set()
    shown: dict[int, dict[str, Any]] = {}
    collected: dict[int, Any] = {}
    failed = 0
    if out:
        settings = {"command": "predict", "task": described.task, "weights": mark_of(model, checkpoint), "top": top}
        settings |= {"classes": described.classes, "preparation": described.prepared.asdict()}
        journal = stream.kept(Path(out), settings, processes)
        if not processes.first:
            return 0
        failed = write_predictions(task, source, journal, Path(out))
        shown = {number: record for number, record in journal.merged() if number in wanted}
        if drawn and task.collect:
            collected = {number: record["answer"] for number, record in journal.merged() if "answer" in record}
        journal.remove()
        print(f"{out}: {len(source)} images" + (f", {failed} of which could not be read" if failed else ""))
    else:
        for records in stream.records():
            for number, record in records.items():
                failed += "error" in record
                print(told(task, source.files[number], record, json), flush=True)
            shown |= {number: record for number, record in records.items() if number in wanted}
            if drawn and task.collect:
                collected |= {number: record["answer"] for number, record in records.items() if "answer" in record}
    if drawn and task.collect and collected:
        rows = [
            {
                "image": source.files[number],
                "size": full_size(source.pictures[number])[::-1],
                "predictions": answer,
            }
            for number, answer in sorted(collected.items())
        ]
        with written_whole(drawn / "predictions.json", "w", encoding="utf-8") as file:
            json_module.dump(task.collect(rows, described), file)
    if sheet:
        draw_predictions(task, source, shown, Path(sheet))
        print(sheet)
    if failed == len(source):
        raise UserError("none of the images could be read")
    return int(failed > 0)


def told(task: Any, name: str, record: dict[str, Any], json: bool) -> str:
    """The line of an image."""
    if json:
        found = {"predictions": record["answer"]} if "answer" in record else record
        return json_module.dumps({"image": name} | found)
    return f"skipped {name}: {record['error']}" if "error" in record else f"{name}: {task.tell(record['answer'])}"
