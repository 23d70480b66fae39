"""One HTML file to look into the slots with: it needs no server and no network, and opens from disk.

Maps travel as grey PNGs, a byte a value, as 255 * sqrt(value): small values, of which soft assignments are full, keep
their differences. What the page shows is in `report.html`.
"""

import base64
import html
import io
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from glmix.errors import UserError
from glmix.files import written_whole
from glmix.models.slot_maps import SlotMaps
from glmix.slots.figures import centres_of, places, tiled
from glmix.slots.look import Look, is_idle
from glmix.slots.regions import strongest_slots
from glmix.slots.representatives import map_distances, representative_slots

MOST_BYTES = 5_000_000  # for an image
CELLS = 4096, 1024, 256, 64  # places of a map, at most: the first with which an image stays below MOST_BYTES
PHOTO_SIDE = 720  # pixels of the longer side
RANKS = 8  # representative slots


def write_slot_report(path: Path, looks: Iterable[Look], about: str) -> list[str]:
    """Write the page.

    Args:
        path: of the file; written beside, then renamed.
        looks: the images, with attention; taken one at a time.
        about: the model, in words.

    Returns:
        The names of the images that are in it.
    """
    template = resources.files("glmix.slots").joinpath("report.html").read_text(encoding="utf-8")
    before, after = template.split("<!-- images -->")
    names = []
    with written_whole(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(before.replace("{about}", html.escape(about)))
        for look in looks:
            # "<" must not end the script element that holds the data
            file.write(f'<script type="application/json" class="image">{encoded(look)}</script>\n')
            names.append(look.name)
        file.write(after)
    return names


def encoded(look: Look) -> str:
    """JSON of an image and its maps, below `MOST_BYTES`; maps are averaged over larger places where need be."""
    for cells in CELLS:
        text = json.dumps(image_data(look, cells)).replace("<", "\\u003c")
        if len(text) < MOST_BYTES:
            return text
    raise UserError(f"{look.name}: {len(text) / 1e6:.1f} MB on the page, too many slots for it; draw --figures instead")


def image_data(look: Look, cells: int) -> dict[str, Any]:
    """What the page gets of an image; maps have at most `cells` places."""
    photo = look.shown.copy()
    photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    return {
        "name": look.name,
        "photo": data_uri(photo, "JPEG"),
        "size": photo.size,
        "described": f"{look.photo[0]} x {look.photo[1]} pixels, seen by the network at {look.seen[0]} x {look.seen[1]}",
        "blocks": [block_data(maps, cells) for maps in look.maps],
    }


def block_data(maps: SlotMaps, cells: int) -> dict[str, Any]:
    """What the page gets of a block."""
    assignment = shown_assignment(maps, cells)
    slots, h, w = assignment.shape
    full = maps.assignment[0].float().cpu()
    ranks = representative_slots(full, RANKS)
    nearest = map_distances(full.flatten(1).numpy())[:, ranks].argmin(1)
    entropy, grid = float(maps.entropy()[0]), places(maps)
    data = {
        "block": maps.block,
        "stride": maps.stride,
        "columns": grid[1],
        "shape": (slots, h, w),
        "entropy": round(entropy, 3),
        "idle": is_idle(entropy),
        "maps": data_uri(Image.fromarray(tiled(roots(assignment), grid)), "PNG"),
        "strongest": data_uri(Image.fromarray(two_bytes(strongest_slots(assignment))), "PNG"),
        "centres": centres_of(assignment, (1, 1)).round(4).tolist(),
        "representatives": ranks,
        "stands_behind": [ranks[i] for i in nearest],
        "heads": 0,
    }
    if maps.attention is not None:
        attention = maps.attention[0].float()
        data["heads"] = len(attention)
        data["attention"] = data_uri(Image.fromarray(roots(attention).reshape(-1, slots)), "PNG")
    return data


def shown_assignment(maps: SlotMaps, cells: int = CELLS[0]) -> Tensor:
    """The assignment (M, h, w) of the first image as the page holds it: means over places until there are `cells`."""
    assignment = maps.assignment[:1].float().cpu()
    h, w = assignment.shape[2:]
    shrink = max(1.0, (h * w / cells) ** 0.5)
    return F.adaptive_avg_pool2d(assignment, (max(1, int(h / shrink)), max(1, int(w / shrink))))[0]


def roots(values: Tensor) -> NDArray[np.uint8]:
    """Values of 0 to 1 as bytes."""
    return (255 * torch.sqrt(values.clamp(0, 1))).round().byte().numpy()


def two_bytes(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Numbers (H, W) below 65536 as red (the lower byte) and green of an image (H, W, 3)."""
    return np.stack([numbers % 256, numbers // 256, np.zeros_like(numbers)], 2).astype(np.uint8)


def data_uri(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=85, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
