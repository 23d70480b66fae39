"""Small data sets of objects, in the forms that annotation tools write."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = {"red": (220, 40, 40), "blue": (40, 60, 220)}


def scene(
    seed: int, size: tuple[int, int] = (48, 64), count: int = 2
) -> tuple[Image.Image, list[tuple[str, list[int]]]]:
    """A grey picture (H, W) with coloured rectangles that do not overlap: each one's class, and x0, y0, x1, y1."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(100, 140, (*size, 3)).astype(np.uint8)
    found = []
    for i in range(count):
        kind = list(NAMES)[int(rng.integers(2))]
        width, height = rng.integers(14, 24, 2).tolist()
        left = 2 + i * size[1] // count
        x0, y0 = left + int(rng.integers(4)), int(rng.integers(size[0] - height))
        pixels[y0 : y0 + height, x0 : x0 + width] = NAMES[kind]
        found.append((kind, [x0, y0, x0 + width, y0 + height]))
    return Image.fromarray(pixels), found


def rectangle(box: list[int]) -> list[list[float]]:
    x0, y0, x1, y1 = box
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def coco(
    objects: list[list[tuple[str, list[int]]]], ids: dict[str, int], size: tuple[int, int] = (48, 64)
) -> dict[str, Any]:
    """COCO's JSON of pictures 0.png, 1.png, …, with every key that it has."""
    annotations: list[dict[str, Any]] = []
    for image, found in enumerate(objects):
        for kind, box in found:
            x0, y0, x1, y1 = box
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": ids[kind], "iscrowd": 0,
                 "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "segmentation": rectangle(box)}
            )  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.png", "height": size[0], "width": size[1]} for i in range(len(objects))]
    return {"images": images, "annotations": annotations, "categories": [{"id": n, "name": k} for k, n in ids.items()]}


def write_split(root: Path, split: str, count: int, seed: int, ids: dict[str, int]) -> dict[str, Any]:
    """Pictures in `split`/ and their JSON in annotations/; returns what the JSON holds."""
    folder = root / split
    folder.mkdir(parents=True)
    objects = []
    for i in range(count):
        picture, found = scene(seed + i)
        picture.save(folder / f"{i}.png")
        objects.append(found)
    content = coco(objects, ids)
    write_json(root, f"instances_{split}.json", content)
    return content


def write_json(root: Path, name: str, content: dict[str, Any]) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / name).write_text(json.dumps(content))
