"""Slots of a whole folder of photos: arrays on disk and contact sheets, in bounded memory, gone on with after a cut."""

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from glmix.data.folders import image_files
from glmix.data.images import BadImage, read_image
from glmix.data.prepare import Preparation
from glmix.data.samples import Skipped
from glmix.errors import UserError
from glmix.files import plain_name, readable, written_whole
from glmix.fonts import pen_font
from glmix.models import GLNet
from glmix.models.slot_maps import slot_maps
from glmix.slots.figures import paint, slot_colors
from glmix.slots.look import is_idle, prepare_whole
from glmix.slots.regions import merge_slots, strongest_slots
from glmix.slots.representatives import representative_slots
from glmix.training.processes import Processes

PAGE = 48  # photos of a contact sheet, and held at a time
COLUMNS = 8
THUMBNAIL = 192  # pixels of the longer side on a contact sheet
LONGEST_NAME = 200  # bytes; file systems take 255, and ours are longer than the photo's


@dataclass
class Job:
    """What is asked of a folder's photos.

    Attributes:
        model, preparation: as for `glmix.slots.look.look`.
        block: index among the GLMix blocks.
        slots: number of representative slots.
        merge: see `merge_slots`.
        batch_size: photos of one size that go through the network together.
        settings: what else decides the results, such as which weights; all has to be the same when a job is gone on
            with.
    """

    model: GLNet
    preparation: Preparation
    block: int
    slots: int
    merge: float
    batch_size: int
    settings: dict[str, Any]

    def recorded(self, folder: Path) -> dict[str, Any]:
        """All that decides what is made of `folder`, as plain data."""
        own = {"folder": str(folder.resolve()), "preparation": self.preparation.asdict()}
        return self.settings | own | {"block": self.block, "slots": self.slots, "merge": self.merge}


def explain_folder(
    folder: Path,
    out: Path,
    job: Job,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
) -> Iterator[tuple[str, int, int, list[Skipped]]]:
    """Write `out/arrays/NAME.npz` for each photo under `folder`, and `out/contact-sheet-001.png` and on.

    An array file holds `assignment` (M, h, w) float16, `entropy`, `representatives`, `slot_grid` (empty where slots
    are not pooled from one), `block`, `stride`, `photo`, its size (W, H), and `made_from`. What is there already and was made from the same files is kept: the same
    command goes on after a cut, and after photos were added, changed or removed.

    Several `processes` take pages in turn.

    Yields:
        After each page of this process: the sheet's path, photos done so far, photos in all, and the page's unreadable ones.

    Raises:
        UserError: no photos, or `out` holds what other settings made.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    ours = out.resolve()
    names = [name for name in image_files(folder) if ours not in (folder / name).resolve().parents]
    if not names:
        raise UserError(f"{folder}: no images in it (files such as a.jpg or b.png)")
    if processes.first:
        check_settings(out, job.recorded(folder))
    processes.wait()
    pages = range(0, len(names), PAGE)
    for number, start in list(enumerate(pages, 1))[processes.rank :: processes.count]:
        sheet = out / f"contact-sheet-{number:03}.png"
        there = {name: state_of(folder / name) for name in names[start : start + PAGE]}
        skipped = make_page(folder, there, out, sheet, job)
        yield str(sheet), min(start + PAGE, len(names)), len(names), skipped
    processes.wait()
    for sheet in out.glob("contact-sheet-*.png") if processes.first else ():  # of photos that are no longer there
        if sheet.stem.rpartition("-")[2].isdigit() and int(sheet.stem.rpartition("-")[2]) > len(pages):
            sheet.unlink()
            sheet.with_suffix(".json").unlink(missing_ok=True)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))  # as they come back from the file
    if path.exists() and read_json(path) != settings:
        raise UserError(f"{out}: holds what other settings made (see settings.json there); choose another --out")
    write_json(path, settings)


def state_of(path: Path) -> str:
    """What changes when a file does."""
    try:
        status = path.stat()
    except OSError:
        return "gone"
    return f"{status.st_size} bytes at {status.st_mtime_ns}"


def make_page(folder: Path, there: dict[str, str], out: Path, sheet: Path, job: Job) -> list[Skipped]:
    """Arrays of the photos `there` (name to state) and their contact sheet, as far as they are missing.

    Returns:
        The unreadable ones.
    """
    record = sheet.with_suffix(".json")  # of what the sheet shows, and what it could not
    before = read_json(record) if sheet.exists() else None
    missing = {name for name, state in there.items() if made_from(out, name) != state}
    if before and before["photos"] == there and missing <= set(before["skipped"]):
        return named(folder, before["skipped"])
    photos: dict[str, Image.Image] = {}
    skipped: dict[str, str] = {}
    waiting: dict[tuple[int, ...], list[tuple[str, torch.Tensor, dict[str, Any]]]] = defaultdict(list)
    for name, state in there.items():
        try:
            photo = read_image(folder / name)
        except BadImage as error:
            skipped[name] = error.reason
            continue
        photos[name] = photo.copy()
        photos[name].thumbnail((THUMBNAIL, THUMBNAIL))
        if name in missing:
            tensor = prepare_whole(photo, job.preparation)
            alike = waiting[tuple(tensor.shape)]
            alike.append((name, tensor, {"photo": photo.info["full_size"], "made_from": state}))
            if len(alike) == job.batch_size:
                write_arrays(waiting.pop(tuple(tensor.shape)), out, job)
    for batch in waiting.values():
        write_arrays(batch, out, job)
    draw_sheet(photos, out, sheet, job.merge)
    write_json(record, {"photos": there, "skipped": skipped})
    return named(folder, skipped)


def named(folder: Path, skipped: dict[str, str]) -> list[Skipped]:
    """Photos under `folder` that are not used, from their names and the reasons."""
    return [Skipped(str(folder / name), reason) for name, reason in skipped.items()]


def array_file(out: Path, name: str) -> Path:
    """Where the arrays of the photo `name` are; a name that is too long for a file system is cut and numbered."""
    path = out / "arrays" / f"{name}.npz"
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        short = plain_name(path.name, LONGEST_NAME - 20)
        path = path.with_name(f"{short}-{zlib.crc32(os.fsencode(name)):08x}.npz")
    return path


def made_from(out: Path, name: str) -> str:
    """The state of the photo that the arrays of `name` were made from; '' if there are none, or damaged ones."""
    try:
        with np.load(array_file(out, name)) as arrays:
            return str(arrays["made_from"])
    except Exception:  # numpy and zipfile raise nearly every kind on damaged files
        return ""


def write_arrays(batch: list[tuple[str, torch.Tensor, dict[str, Any]]], out: Path, job: Job) -> None:
    """Maps of photos of one size, each to its own file."""
    together = slot_maps(job.model, torch.stack([tensor for _, tensor, _ in batch]))[job.block]
    for i, (name, _, origin) in enumerate(batch):
        maps = together.of_image(i)
        assignment = maps.assignment[0].float().cpu()
        with written_whole(array_file(out, name)) as file:
            np.savez_compressed(
                file,
                assignment=assignment.numpy().astype(np.float16),
                entropy=float(maps.entropy()[0]),
                representatives=representative_slots(assignment, job.slots),
                slot_grid=np.array(maps.slot_grid or (), int),
                block=maps.block,
                stride=maps.stride,
                **origin,
            )


def draw_sheet(photos: dict[str, Image.Image], out: Path, sheet: Path, merge: float) -> None:
    """Each photo above its merged regions, `COLUMNS` in a row; with its name, and the entropy of its assignment."""
    gap, line = 8, 14
    width, height = THUMBNAIL + gap, 2 * (THUMBNAIL + line) + gap
    rows = max(1, -(-len(photos) // COLUMNS))
    picture = Image.new("RGB", (COLUMNS * width + gap, rows * height + gap), "white")
    pen = ImageDraw.Draw(picture)
    for place, (name, photo) in enumerate(photos.items()):
        with np.load(array_file(out, name)) as arrays:
            assignment, entropy = torch.from_numpy(arrays["assignment"].astype(np.float32)), float(arrays["entropy"])
        array, idle = np.asarray(photo), is_idle(entropy)
        labels = merge_slots(assignment, strongest_slots(assignment, array.shape[:2]), merge)
        regions = Image.fromarray(paint(array, labels, slot_colors(len(assignment)), idle))
        text = f"entropy {entropy:.2f}" + (", idle" if idle else "")
        x, y = gap + place % COLUMNS * width, gap + place // COLUMNS * height
        for part, label in ((photo, Path(name).name[-30:]), (regions, text)):
            pen.text((x, y), readable(label), fill="black", font=pen_font(label, 10))
            picture.paste(part, (x, y + line))
            y += THUMBNAIL + line
    with written_whole(sheet) as file:
        picture.save(file, "PNG")


def read_json(path: Path) -> Any:
    """What a file of ours holds; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """What `read_json` reads."""
    with written_whole(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
