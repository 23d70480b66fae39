"""Scenes drawn from a seed: textured objects on textured backgrounds, with exact labels, boxes and masks.

The data set that needs no download. What an object is shows in its outline alone: textures, colours and the painted
area of an object are drawn alike for every class, so counting colours tells nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from PIL import Image

from glmix.data.samples import DataSet, Several, Source
from glmix.errors import UserError
from glmix.files import written_whole

SCENES = "scenes"  # what --data calls them
MAIN = 0.36, 0.52  # root of an object's area, in sides of the image
SMALL = 0.11, 0.16
OFFSET = 0.1  # how far from the middle the main object's centre can be, in sides, along each axis
STRETCH = 0.15  # largest |log| of the stretch along one axis; the other shrinks by as much
CONTRAST = 0.48  # least distance of an object's colours from those around it, in RGB of 0..1
GRAIN = 0.012
SPLITS = {"train": (0, 4000), "val": (1, 800)}  # seed, number of scenes


def _heart(x: ndarray, y: ndarray) -> ndarray:
    """A square, and a disc on each of two adjacent sides."""
    x, y = x + 0.25, y + 0.25
    lobes = np.minimum(np.hypot(x - 0.6, y), np.hypot(x, y - 0.6))
    return np.minimum(np.maximum(np.abs(x), np.abs(y)), lobes) - 0.6


def _star(x: ndarray, y: ndarray) -> ndarray:
    """Five points. All are folded onto one half of one, where the outline is a line from the tip to the notch."""
    fifth = 2 * np.pi / 5
    radius, angle = np.hypot(x, y), np.abs((np.arctan2(y, x) + fifth / 2) % fifth - fifth / 2)
    notch = 0.42 * np.exp(0.5j * fifth)
    normal = -1j * (notch - 1) / abs(notch - 1)
    return (radius * np.cos(angle) - 1) * normal.real + radius * np.sin(angle) * normal.imag


# Distance from the outline, negative inside (about so at some corners); in order of name, as class folders are.
SHAPES: dict[str, Callable[[ndarray, ndarray], ndarray]] = {
    "crescent": lambda x, y: np.maximum(np.hypot(x - 0.25, y) - 1, 0.8 - np.hypot(x - 0.8, y)),
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.3),
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "heart": _heart,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.77) - 0.23,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 1,
    "star": _star,
    "triangle": lambda x, y: np.maximum(np.sqrt(0.75) * abs(y) - 0.5 * x, x) - 0.5,
}
CLASSES = tuple(SHAPES)


@dataclass(frozen=True)
class Scene:
    """An image and what is in it. Instances are in order from front to back; the main object is the first.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        label: index in `CLASSES` of the main object, the scene's largest.
        boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, tight around what is visible of each instance; x1, y1 exclusive.
        labels: (n,) int64 index in `CLASSES` of each instance.
        instances: (H, W) uint8, 0 for background, k for the instance of row k - 1.
        semantic: (H, W) uint8, 0 for background, 1 + index in `CLASSES`.
    """

    image: ndarray
    label: int
    boxes: ndarray
    labels: ndarray
    instances: ndarray
    semantic: ndarray


def scene_label(seed: int, index: int) -> int:
    """The label of a scene, without drawing it: every run of `len(CLASSES)` scenes has each class once, shuffled."""
    run, place = divmod(index, len(CLASSES))
    return int(np.random.default_rng((seed, run, 1)).permutation(len(CLASSES))[place])


def make_scene(seed: int, index: int, size: int = 96) -> Scene:
    """Scene `index` of `seed`, `size` pixels a side: a large object near the middle, with up to two small ones.

    All but the grain is drawn in sides of the image, so another size gives the same scene. Small objects are of any
    class, can be partly behind the main one or each other, and are left out where less than half of them would be seen.
    """
    rng = np.random.default_rng((seed, index))
    label = scene_label(seed, index)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = np.meshgrid(axis, axis)
    palettes = [_colours(rng, [])]
    image = _paint(rng, palettes[0], x, y)

    depths = [_depth(rng, label, rng.uniform(*MAIN), rng.uniform(-OFFSET, OFFSET, 2), x, y)]
    kinds, masks = [label], [depths[0] > 0]
    covered = masks[0]
    for _ in range(rng.integers(3)):
        kind = int(rng.integers(len(CLASSES)))
        depth = _depth(rng, kind, rng.uniform(*SMALL), rng.uniform(-0.42, 0.42, 2), x, y)
        visible = (depth > 0) & ~covered
        if 2 * visible.sum() > (depth > 0).sum():
            depths, kinds, masks = [*depths, depth], [*kinds, kind], [*masks, visible]
            covered = covered | visible
    for depth in reversed(depths):
        palettes.append(_colours(rng, palettes))
        opacity = (depth + 0.5).clip(0, 1)[..., None]  # over one pixel, half at the outline: above half is in the mask
        image += opacity * (_paint(rng, palettes[-1], x, y) - image)
    image += GRAIN * rng.standard_normal((size, size, 1), dtype=np.float32)

    instances = np.zeros((size, size), np.uint8)
    for number, mask in enumerate(masks, 1):
        instances[mask] = number
    return Scene(
        image=(255 * image.clip(0, 1)).round().astype(np.uint8),
        label=label,
        boxes=np.stack([_box(mask) for mask in masks]),
        labels=np.array(kinds),
        instances=instances,
        semantic=np.array([0, *(kind + 1 for kind in kinds)], np.uint8)[instances],
    )


def _depth(rng: np.random.Generator, kind: int, extent: float, centre: ndarray, x: ndarray, y: ndarray) -> ndarray:
    """Pixels (H, W) from the outline, positive inside, of a shape turned and stretched at random.

    `extent` is the root of its area and `centre` its place, both in sides of the image.
    """
    turn, lean = rng.uniform(0, 2 * np.pi, 2)
    stretch = np.exp(rng.uniform(-STRETCH, STRETCH))
    scale = extent / _extent(kind)
    matrix = _rotation(turn) @ np.diag([stretch, 1 / stretch]) @ _rotation(lean) / scale
    (a, b), (c, d) = matrix.astype(np.float32)
    x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
    return -np.float32(scale * len(x)) * SHAPES[CLASSES[kind]](a * x + b * y, c * x + d * y)


def _rotation(angle: float) -> ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


@cache
def _extent(kind: int) -> float:
    """Root of the area of a shape as `SHAPES` has it."""
    x, y = np.meshgrid(*[np.linspace(-2, 2, 512)] * 2)
    return 4 * float(np.sqrt((SHAPES[CLASSES[kind]](x, y) < 0).mean()))


def _colours(rng: np.random.Generator, others: list[ndarray]) -> ndarray:
    """Two colours (2, 3) whose blends differ by `CONTRAST` from those of `others`; else the farthest of some tries."""
    first = rng.random((32, 1, 3), dtype=np.float32)
    greyness = 0.7 * rng.random((32, 1, 1), dtype=np.float32)
    first += greyness * (first.mean(-1, keepdims=True) - first)
    second = first + rng.normal(0, 0.12, first.shape).astype(np.float32)
    tries = np.concatenate([first, second.clip(0, 1)], 1)
    weights = np.linspace(0, 1, 4, dtype=np.float32)
    blend = np.stack([1 - weights, weights], 1)
    around = np.concatenate([np.empty((0, 3), np.float32), *(blend @ pair for pair in others)])
    distances = np.linalg.norm((blend @ tries)[:, :, None] - around, axis=-1)
    return tries[distances.min((1, 2), initial=CONTRAST).argmax()]


def _paint(rng: np.random.Generator, colours: ndarray, x: ndarray, y: ndarray) -> ndarray:
    """Image (H, W, 3) of two colours (2, 3) in a random pattern: plain, gradient, stripes, checks, dots or clouds."""
    kind = rng.integers(6)
    angle, period, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0.07, 0.2), rng.random(2)
    sine, cosine = np.float32(np.sin(angle)), np.float32(np.cos(angle))
    a, b = cosine * x + sine * y, cosine * y - sine * x
    u, v = (np.float32(2 * np.pi / period) * axis for axis in (a + np.float32(shift[0]), b + np.float32(shift[1])))
    sharpness = np.float32(period * len(x) / (2 * np.pi))  # waves become edges of about a pixel
    if kind == 0:
        amount = np.zeros_like(x)
    elif kind == 1:
        amount = a + 0.5
    elif kind == 2:
        amount = 0.5 + sharpness * np.sin(u)
    elif kind == 3:
        amount = 0.5 + sharpness * np.sin(u) * np.sin(v)
    elif kind == 4:
        amount = 0.5 + sharpness * (np.cos(u) + np.cos(v) - 0.5)
    else:
        cells = rng.random([rng.integers(5, 12)] * 2, dtype=np.float32)
        amount = np.asarray(Image.fromarray(cells).resize(x.shape, Image.Resampling.BICUBIC))
    return colours[0] + amount.clip(0, 1)[..., None] * (colours[1] - colours[0])


def _box(mask: ndarray) -> ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


@dataclass(frozen=True)
class SceneSet:
    """The images of `count` scenes of `seed`, `side` pixels a side; drawn anew whenever one is asked for."""

    count: int
    seed: int = 0
    side: int = 96

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.scene(index).image)

    def size(self, index: int) -> int:
        """Pixels a side, which stand for bytes."""
        return self.side

    def scene(self, index: int) -> Scene:
        """The scene at `index`, with boxes and masks."""
        return make_scene(self.seed, index, self.side)

    def source(self) -> "SceneSource":
        """The images with the main object's class."""
        files = [f"scene-{index:06d}" for index in range(self.count)]
        return SceneSource(files, self, [scene_label(self.seed, index) for index in range(self.count)], list(CLASSES))


class SceneSource(Source):
    """Generated scenes with the main object's class; `pictures` draws them."""

    pictures: SceneSet


def scene_split(split: str, count: int | None = None, size: int = 96) -> SceneSource:
    """The scenes for `split` 'train' or 'val', which share none; 4000 and 800 where `count` is None."""
    seed, usual = SPLITS[split]
    return SceneSet(usual if count is None else count, seed, size).source()


def scan_scenes() -> DataSet:
    """The scenes of both splits."""
    train, val = (scene_split(split) for split in SPLITS)
    places = [(source.pictures, i) for source in (train, val) for i in range(len(source))]
    whole = Source(train.files + val.files, Several(places), [*train.targets, *val.targets], list(CLASSES))
    named = {"train": list(range(len(train))), "val": list(range(len(train), len(whole)))}
    return DataSet(SCENES, whole, named)


def write_scenes(out: Path, count: int, seed: int = 0, size: int = 96) -> list[Path]:
    """Write scenes as PNG files in class folders, and `annotations.json` beside those, in COCO's form for instances.

    Masks are uncompressed RLE, and an annotation's category is 1 + index in `CLASSES`. Returns the images' paths.

    Raises:
        UserError: the folder holds other files, which would be taken for scenes or classes.
    """
    scenes = SceneSet(count, seed, size)
    source = scenes.source()
    names = [f"{CLASSES[label]}/{file}.png" for label, file in zip(source.targets, source.files, strict=True)]
    others = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()} - {*names, "annotations.json"}
    if others:
        raise UserError(f"{out}: already holds other files (such as {min(others)}); give a new or an empty folder")
    annotations: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        scene = scenes.scene(index)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene.image).save(out / name)
        for row, (x0, y0, x1, y1) in enumerate(scene.boxes.tolist()):
            mask = scene.instances == row + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCO's evaluation takes 0 for no match
                    "image_id": index,
                    "category_id": int(scene.labels[row]) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "segmentation": {"size": [size, size], "counts": run_lengths(mask)},
                    "iscrowd": 0,
                }
            )
    images = [{"id": i, "file_name": name, "width": size, "height": size} for i, name in enumerate(names)]
    categories = [{"id": kind + 1, "name": name} for kind, name in enumerate(CLASSES)]
    with written_whole(out / "annotations.json", "w", encoding="utf-8") as file:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, file)
    return [out / name for name in names]


def run_lengths(mask: ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn, down the columns, the first of 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
