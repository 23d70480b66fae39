"""`glmix segment`."""

import json as json_module
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmix.commands.common import check_not_empty, pick_device
from glmix.commands.weak_segment import classifier_with_slots
from glmix.data.images import BadImage, full_size
from glmix.data.pictures import open_pictures
from glmix.errors import UserError
from glmix.files import check_folder, readable, written_whole
from glmix.models import SHIPPED, GLNet
from glmix.models.description import Description
from glmix.ranges import NonNegativeInt, PositiveInt, Share
from glmix.slots.class_maps import SCALES, MapKind, linear_classifier
from glmix.slots.spread import Way, spread_by
from glmix.slots.weak import Seer, mask_of, scores_at
from glmix.tasks.segment import draw
from glmix.use.predictions import different_stems

MOST_NUMBERED = 254  # classes of a mask of 8 bits, beside 0 for background and 255 for what is ignored elsewhere


def segment(
    sources: list[str],
    out: str = "masks",
    weak: bool = False,
    checkpoint: str = SHIPPED,
    labels: str = "",
    top: PositiveInt = 1,
    maps: MapKind = "gradient",
    blocks: list[int] | None = None,
    steps: NonNegativeInt = 1,
    mix: Share = 1.0,
    threshold: Share = 0.5,
    scales: list[float] | None = None,
    image_size: int = 0,
) -> int:
    """Masks of objects from a classifier that learned from image labels alone, by its class maps spread through its slots.

    Writes NAME.map.png, whose numbers are classes, NAME.classes.png to look at, and masks.json.

    Args:
        sources: images, as for `glmix predict`.
        out: folder for what is written.
        weak: has to be given: masks are guessed from what a classifier looks at. What learned from masks is
            `glmix predict --pictures`.
        checkpoint: run folder, file (ours or a released one) or model name of a classifier; left out, the weights that
            ship.
        labels: classes that are in the images, with commas between; left out, those that the model finds likeliest.
        top: as many of these as are taken.
        maps: where the evidence for a class is taken from: gradient (times the features), grad-cam or cam.
        blocks: GLMix blocks, counted from 0 (or from -1, the last), through whose slots maps are spread, in this order; left out, the last.
        steps: how often through each; 0 leaves maps as they are.
        mix: share of what was spread; the rest is the map as it was.
        threshold: background is where no map reaches this share of the way from its lowest to its highest value.
        scales: sizes at which maps are taken, times the usual; left out, [0.5, 1.0, 1.5, 2.0].
        image_size: shorter side at which the network sees an image; 0 for that of the checkpoint.
    """
    if not weak:
        raise UserError(
            "segment: from a classifier, by --weak; a model that learned from masks: glmix predict --pictures DIR"
        )
    check_folder("--out", out)
    if labels and top != 1:
        raise UserError("--top: the classes are those of --labels; leave it out")
    if steps == 0 and (blocks or mix != 1.0):
        raise UserError("--blocks, --mix: with --steps 0 maps stay as they are; leave them out")
    check_not_empty("--blocks", blocks)
    check_not_empty("--scales", scales)
    if scales and min(scales) <= 0:
        raise UserError(f"--scales {scales}: above 0")
    model, described = classifier_with_slots(checkpoint, image_size)
    names = list(model.slot_mixers())
    for number in blocks or []:
        if not -len(names) <= number < len(names):
            raise UserError(f"--blocks {number}: this model has 0 to {len(names) - 1}")
    way = Way(tuple(names[number] for number in blocks or [-1]) if steps else (), steps or 1, mix)
    given = labels_named(labels, described)
    source = open_pictures(sources)
    seer = Seer(model, described.prepared, linear_classifier(model), maps, tuple(scales or SCALES))
    places = Path(out)
    records: list[dict[str, Any]] = []
    for index, stem in enumerate(different_stems(source.files)):
        name = readable(source.files[index])
        try:
            photo = source.pictures[index]
        except BadImage as error:
            print(f"skipped {error}")
            records.append({"image": name, "error": readable(error.reason)})
            continue
        size = full_size(photo)
        found = likeliest(model, described, photo)
        classes = given or sorted(found, key=lambda row: -found[row])[:top]
        if len(classes) > MOST_NUMBERED:
            raise UserError(f"{len(classes)} classes at a time: a mask numbers {MOST_NUMBERED} at most")
        numbers, called = numbered(classes, described)
        spread_maps = spread_by(seer.maps(photo, classes), seer.slots(photo) if way.path else {}, way)
        mask = torch.from_numpy(mask_of(scores_at(spread_maps, size[::-1]), numbers, threshold))
        for kind, picture in draw(photo, mask, replace(described, names=called)).items():
            with written_whole(places / f"{stem}.{kind}.png") as file:
                picture.save(file, "PNG")
        objects: list[dict[str, Any]] = [
            {"label": described.classes[row], "name": described.names[row], "number": number,
             "probability": round(found[row], 4), "share": round(float((mask == number).float().mean()), 4)}
            for row, number in zip(classes, numbers, strict=True)
        ]  # fmt: skip
        records.append({"image": name, "size": list(size), "mask": f"{stem}.map.png", "objects": objects})
        print(f"{name}: " + ", ".join(f"{one['name']} {100 * one['share']:.0f} % of it" for one in objects), flush=True)
    settings = {"checkpoint": checkpoint, "model": described.model, "maps": maps, "scales": list(seer.scales),
                "blocks": list(way.path), "steps": steps, "mix": mix, "threshold": threshold}  # fmt: skip
    failed = sum("error" in record for record in records)
    if failed == len(records):
        raise UserError("none of the images could be read")
    with written_whole(places / "masks.json", "w", encoding="utf-8") as file:
        json_module.dump({"settings": settings, "images": records}, file, indent=1)
    print(places / "masks.json")
    return int(failed > 0)


def labels_named(text: str, described: Description) -> list[int]:
    """The model's classes that are named in `text`, by label or by name.

    Raises:
        UserError: it has no such class.
    """
    known = {name: row for names in (described.names, described.classes) for row, name in enumerate(names)}
    asked = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if text and not asked:
        raise UserError(f"--labels {text!r}: names no class")
    for name in asked:
        if name not in known:
            some = ", ".join(described.names[:10]) + (" …" if len(described.names) > 10 else "")
            raise UserError(f"--labels {name}: the model's classes are {some}")
    return [known[name] for name in asked]


@torch.inference_mode()
def likeliest(model: GLNet, described: Description, photo: Any) -> dict[int, float]:
    """The probability of each class."""
    tensor = described.prepared(photo)[None].to(pick_device())
    return dict(enumerate(model(tensor)[0].float().softmax(0).tolist()))


def numbered(classes: Sequence[int], described: Description) -> tuple[list[int], list[str]]:
    """The numbers of classes in a mask, and the name of each number: their own where there is room, else in turn."""
    if len(described.names) <= MOST_NUMBERED:
        return [row + 1 for row in classes], ["background", *described.names]
    return list(range(1, len(classes) + 1)), ["background", *(described.names[row] for row in classes)]
