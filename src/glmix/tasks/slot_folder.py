"""Slots of a whole folder of photos: arrays on disk and contact sheets, in bounded memory, gone on with after a cut."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from glmix.data.images import SUFFIXES, BadImage, read_image
from glmix.errors import UserError
from glmix.models import GLNet
from glmix.models.slot_maps import slot_maps
from glmix.tasks.explain import prepare_whole, seen_size
from glmix.tasks.figures import IDLE, paint, slot_colors
from glmix.tasks.regions import merge_slots, strongest_slots
from glmix.tasks.representatives import representative_slots

PAGE = 48  # photos of a contact sheet, and held at a time
COLUMNS = 8
THUMBNAIL = 192  # pixels of the longer side on a contact sheet


@dataclass
class Job:
    """What is asked of a folder's photos.

    Attributes:
        model, image: as for `glmix.tasks.explain.look`.
        block: index among the GLMix blocks, negative from the last.
        slots: number of representative slots.
        merge: see `merge_slots`.
        batch_size: photos of one size that go through the network together.
        settings: what decides the arrays, to be the same when a job is gone on with.
    """

    model: GLNet
    image: dict[str, Any]
    block: int
    slots: int
    merge: float
    batch_size: int
    settings: dict[str, Any]


def explain_folder(folder: Path, out: Path, job: Job) -> Iterator[tuple[str, int, int, list[str]]]:
    """Write `out/arrays/NAME.npz` for each photo under `folder`, and `out/contact-sheet-001.png` and on.

    An array file holds `assignment` (M, h, w) float16, `entropy`, `representatives`, `slot_grid`, `block`, `stride` and
    `photo`, its size (W, H). What is there already is kept: the same command goes on after a cut.

    Yields:
        After each page: the sheet's path, photos done so far, photos in all, and the page's unreadable ones with reasons.

    Raises:
        UserError: no photos, or `out` holds what other settings made.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = sorted(
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, files in os.walk(folder)
        for name in files
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
    if not names:
        raise UserError(f"{folder}: no images; expected {', '.join(SUFFIXES[:4])} … files")
    check_settings(out, job.settings)
    digits = max(3, len(str(len(names))))
    for page, start in enumerate(range(0, len(names), PAGE), 1):
        sheet = out / f"contact-sheet-{page:0{digits}}.png"
        listed = sheet.with_suffix(".json")  # what the sheet shows: another set of photos makes it anew
        there = names[start : start + PAGE]
        skipped: list[str] = []
        if not (sheet.exists() and listed.exists() and json.loads(listed.read_text()) == there):
            skipped = make_page(folder, there, out, sheet, job)
            write_beside(listed, json.dumps(there).encode())
        yield str(sheet), min(start + PAGE, len(names)), len(names), skipped


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"{out}: holds what other settings made (see settings.json there); choose another --out")
    write_beside(path, json.dumps(settings, indent=1).encode())


def make_page(folder: Path, names: list[str], out: Path, sheet: Path, job: Job) -> list[str]:
    """Arrays of the photos `names` that have none yet, and their contact sheet; returns the unreadable ones."""
    photos: dict[str, Image.Image] = {}
    waiting: dict[tuple[int, int], list[tuple[str, torch.Tensor, tuple[int, int]]]] = defaultdict(list)
    skipped = []
    for name in names:
        try:
            photo = read_image(folder / name)
        except BadImage as error:
            skipped.append(str(error))
            continue
        photos[name] = photo.copy()
        photos[name].thumbnail((THUMBNAIL, THUMBNAIL))
        if not array_file(out, name).exists():
            size = seen_size(photo.size, job.image["input_size"][-1])
            waiting[size].append((name, prepare_whole(photo, job.image), photo.size))
            if len(waiting[size]) == job.batch_size:
                write_arrays(waiting.pop(size), out, job)
    for batch in waiting.values():
        write_arrays(batch, out, job)
    draw_sheet(photos, out, sheet, job.merge)
    return skipped


def array_file(out: Path, name: str) -> Path:
    return out / "arrays" / f"{name}.npz"


def write_arrays(batch: list[tuple[str, torch.Tensor, tuple[int, int]]], out: Path, job: Job) -> None:
    """Maps of photos of one size, each to its own file."""
    maps = slot_maps(job.model, torch.stack([tensor for _, tensor, _ in batch]))[job.block]
    assignment, entropy = maps.assignment.float().cpu(), maps.entropy().cpu()
    for i, (name, _, photo) in enumerate(batch):
        path = array_file(out, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        with open(beside, "wb") as file:
            np.savez_compressed(
                file,
                assignment=assignment[i].numpy().astype(np.float16),
                entropy=float(entropy[i]),
                representatives=representative_slots(assignment[i], job.slots),
                slot_grid=maps.slot_grid,
                block=maps.block,
                stride=maps.stride,
                photo=photo,
            )
        beside.replace(path)


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
        array = np.asarray(photo)
        labels = merge_slots(assignment, strongest_slots(assignment, array.shape[:2]), merge)
        regions = Image.fromarray(paint(array, labels, slot_colors(len(assignment))))
        text = f"entropy {entropy:.2f}" + (", idle" if entropy >= IDLE else "")
        x, y = gap + place % COLUMNS * width, gap + place // COLUMNS * height
        for part, label in ((photo, Path(name).name[-30:]), (regions, text)):
            pen.text((x, y), label.encode("latin-1", "replace").decode("latin-1"), fill="black")  # all the font has
            picture.paste(part, (x, y + line))
            y += THUMBNAIL + line
    beside = sheet.with_name(f".{sheet.stem}.part.png")
    picture.save(beside)
    beside.replace(sheet)


def write_beside(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    beside.replace(path)
