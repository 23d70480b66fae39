"""Detection: boxes of objects, and with Mask R-CNN their masks."""

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import masks_to_boxes
from torchvision.transforms import InterpolationMode, v2

from glmix.console import say
from glmix.data.check import check_objects
from glmix.data.detection import open_objects
from glmix.data.images import full_size
from glmix.data.loading import Batch, Transform, alike, padded
from glmix.data.objects import STRAYING, Objects, ObjectSource, area_of, decoded, encoded, run_lengths
from glmix.data.prepare import Preparation
from glmix.data.samples import Sample, Source
from glmix.errors import UserError, needs
from glmix.models import build, config_of
from glmix.models.description import Description
from glmix.models.heads.detect import DETECTIONS, GROUPS
from glmix.ranges import NonNegativeFloat, Share
from glmix.tasks.dense import DenseOptions, start
from glmix.tasks.pictures import outlined
from glmix.training.processes import gathered
from glmix.training.task import BOX, Task

KINDS = {"box": "bbox", "mask": "segm"}  # what is measured, and pycocotools' name of it
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
           "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")  # in pycocotools' order  # fmt: skip
SURE = 0.4  # score from which a detection counts as one, in pictures and among an image's mistakes
WORST = 10  # images that are named
LEAST_BOX = 1.0  # pixels: what augmentation leaves of a box, to be learned


@dataclass
class DetectOptions(DenseOptions):
    """Options of `glmix train` for detection.

    Args:
        head: retinanet finds boxes, mask-rcnn boxes and masks.
        anchors: sides of the anchors in pixels, one for each of five levels, such as 16 32 64 128 256; left out, 32 to 512.
        box_head: v1 as in the papers, or torchvision's v2, with GroupNorm, which small batches profit from.
        image_size: shorter side of the images, and the most that the longer one may have, in pixels.
        scales: shorter sides that training images take by chance, as in --scales 640 672 704; left out, that of image_size.
        large_scale_jitter: least and largest factor by which a training image is scaled at random, and then cut or filled
            to the size of the longer side, such as [0.1, 2.0]; left out, none.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip, where up and down are alike.
        color_jitter: strength of brightness, contrast, saturation and, a tenth of it, hue changes.
    """

    head: Literal["retinanet", "mask-rcnn"] = "retinanet"
    anchors: list[int] = field(default_factory=list)
    box_head: Literal["v1", "v2"] = "v1"
    image_size: tuple[int, int] = (800, 1333)
    scales: list[int] = field(default_factory=list)
    large_scale_jitter: list[float] = field(default_factory=list)
    hflip: Share = 0.5
    vflip: Share = 0.0
    color_jitter: NonNegativeFloat = 0.0

    GROUPS: ClassVar[dict[str, str]] = DenseOptions.GROUPS | {"image_size": "images and their augmentation"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.image_size = (self.image_size[0], self.image_size[1])
        if min([*self.image_size, *self.scales, 32]) < 32:
            raise ValueError(
                f"image_size {list(self.image_size)}, scales {self.scales}: at least 32 pixels, the network's stride"
            )
        if self.image_size[0] > self.image_size[1]:
            raise ValueError(f"image_size {list(self.image_size)}: the shorter side first")
        if self.anchors and (len(self.anchors) != 5 or min(self.anchors) < 1):
            raise ValueError(f"anchors {self.anchors}: five sides in pixels, such as [32, 64, 128, 256, 512]")
        if self.box_head == "v2" and self.head_channels and self.head_channels % min(GROUPS, self.head_channels):
            raise ValueError(
                f"head_channels {self.head_channels}: a multiple of {GROUPS} with box_head v2, whose norms have so many groups"
            )
        jitter = self.large_scale_jitter
        if jitter and (len(jitter) != 2 or not 0 < jitter[0] <= jitter[1]):
            raise ValueError(f"large_scale_jitter {jitter}: the least and the largest factor, such as [0.1, 2.0]")

    def described_head(self) -> dict[str, Any]:
        return super().described_head() | {"anchors": list(self.anchors), "box_head": self.box_head}


def prepare(options: DetectOptions, model: nn.Module) -> Preparation:
    """How the run prepares validation images."""
    usual = Preparation.of(config_of(model))
    return replace(usual, size=options.image_size, resize="short", crop=1.0).checked()


@dataclass(frozen=True)
class Measured:
    """Transform of a sample to evaluate on: its target becomes what is needed to bring answers back to the picture."""

    preparation: Preparation

    def __call__(self, sample: Sample) -> Sample:
        width, height = full_size(sample.image)
        target = {"size": (height, width), "objects": sample.target, "name": sample.name}
        return sample._replace(image=self.preparation(sample.image), target=target)


class Augmented:
    """Transform of a training sample: picture, boxes and masks flipped, scaled and cut alike.

    Args:
        options: of the run.
        preparation: of the pictures.
        masks: whether they are needed.
    """

    def __init__(self, options: DetectOptions, preparation: Preparation, masks: bool) -> None:
        self.preparation, self.masks, self.cut = preparation, masks, bool(options.large_scale_jitter)
        o, (short, long) = options, options.image_size
        steps: list[Any] = [v2.RandomHorizontalFlip(o.hflip), v2.RandomVerticalFlip(o.vflip)]
        if o.color_jitter:
            steps.append(v2.ColorJitter(*[o.color_jitter] * 3, min(0.5, o.color_jitter / 10)))
        interpolation = InterpolationMode(preparation.interpolation)
        if o.large_scale_jitter:
            fill = tuple(round(255 * value) for value in preparation.mean)
            jitter = (o.large_scale_jitter[0], o.large_scale_jitter[1])
            steps += [
                v2.ScaleJitter((long, long), jitter, interpolation),
                v2.RandomCrop(
                    (long, long), pad_if_needed=True, fill={Image.Image: fill, tv_tensors.Mask: 0, "others": 0}
                ),
            ]
        else:
            steps.append(v2.RandomShortestSize(o.scales or [short], long, interpolation))
        self.vary = v2.Compose([*steps, v2.ClampBoundingBoxes()])

    def __call__(self, sample: Sample) -> Sample:
        picture, objects = sample.image, sample.target
        learned = np.flatnonzero(objects.learned(self.masks))
        canvas = (picture.height, picture.width)
        factor = np.array([*canvas[::-1], *canvas[::-1]]) / [*objects.size[::-1], *objects.size[::-1]]
        parts: dict[str, Any] = {
            "image": picture,
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(objects.boxes[learned] * factor, dtype=torch.float32).reshape(-1, 4),
                format="XYXY",
                canvas_size=canvas,
            ),
        }
        if self.masks:
            masks = tv_tensors.Mask(torch.from_numpy(objects.masks(learned)))
            if objects.size != canvas:  # a huge picture is read at a fraction
                masks = tv_tensors.Mask(v2.functional.resize(masks, list(canvas), InterpolationMode.NEAREST))
            parts["masks"] = masks
        parts = self.vary(parts)
        boxes = parts["boxes"].as_subclass(Tensor)
        if self.masks and self.cut:  # what is left of an object may be smaller than what is left of its box
            boxes = boxes_around(parts["masks"].as_subclass(Tensor))
        kept = (boxes[:, 2] - boxes[:, 0] >= LEAST_BOX) & (boxes[:, 3] - boxes[:, 1] >= LEAST_BOX)
        if self.masks:
            kept &= parts["masks"].as_subclass(Tensor).flatten(1).bool().any(1)
        target = {"boxes": boxes[kept], "labels": torch.from_numpy(objects.labels[learned])[kept]}
        if self.masks:
            target["masks"] = parts["masks"].as_subclass(Tensor)[kept]
        return sample._replace(image=self.preparation.tensor(parts["image"]), target=target)


def boxes_around(masks: Tensor) -> Tensor:
    """Boxes (n, 4) around masks (n, H, W); without area around empty ones."""
    full = masks.bool().flatten(1).any(1)
    boxes = masks.new_zeros(len(masks), 4, dtype=torch.float32)
    boxes[full] = masks_to_boxes(masks[full]).float() + boxes.new_tensor([0, 0, 1, 1])
    return boxes


def training(
    options: DetectOptions, model: nn.Module, description: Description, source: Source
) -> tuple[Source, Transform]:
    """Training images through the augmentations of the options.

    Raises:
        UserError: masks are to be learned, and more than a tenth of the objects have none.
    """
    masks = options.head == "mask-rcnn"
    if masks:
        objects = [(i, row) for i in range(len(source)) for row in source.targets[i].rows if not row.crowd]
        bare = [(i, row) for i, row in objects if row.segmentation is None]
        if bare:
            place, row = bare[0]
            first = f"{source.files[place]}, object {row.id}, has no mask"
            if len(bare) > STRAYING * len(objects):
                raise UserError(
                    f"{options.data}: {len(bare)} of {len(objects)} objects have no mask, and mask-rcnn learns from masks; "
                    f"use --head retinanet (first: {first})"
                )
            say(f"{len(bare)} of {len(objects)} objects are not learned: {first}")
    return source, Augmented(options, description.prepared, masks)


class DetectLoss:
    """The sum of the head's losses, over images of any sizes."""

    def __init__(self, options: DetectOptions, model: nn.Module, description: Description) -> None:
        pass

    def __call__(self, model: nn.Module, batch: Batch, epoch: int) -> Tensor:
        images = batch.images.contiguous(memory_format=torch.channels_last)
        found = model(images, batch.sizes, with_whole_masks(batch))
        return torch.stack(list(found.values())).sum()


def with_whole_masks(batch: Batch) -> list[dict[str, Tensor]]:
    """The targets of a batch, whose masks are filled as its images are."""
    height, width = batch.images.shape[-2:]

    def filled(masks: Tensor) -> Tensor:
        return nn.functional.pad(masks, (0, width - masks.shape[-1], 0, height - masks.shape[-2]))

    return [t | {"masks": filled(t["masks"])} if "masks" in t else t for t in batch.targets]


def forward(model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
    """What is found in each image, its boxes in pixels of the picture as it was before it was prepared."""
    found: list[dict[str, Tensor]] = []
    for images, sizes in alike(batch):
        found += model(images.contiguous(memory_format=torch.channels_last), sizes)
    for each, seen, target in zip(found, batch.sizes, batch.targets, strict=True):
        factors = [whole / part for whole, part in zip(target["size"], seen, strict=True)]
        each["boxes"] = each["boxes"] * each["boxes"].new_tensor([*factors[::-1], *factors[::-1]])
    return found


def align(source: Source, description: Description, data: str) -> Source:
    """`source` with the model's class indices, by class name.

    Raises:
        UserError: a class is none of the model's.
    """
    assert isinstance(source, ObjectSource)
    there = {row.label for i in range(len(source)) for row in source.targets[i].rows}
    index = description.class_index(source.classes, data, there)
    return replace(source, classes=description.classes, order=[index.get(name, -1) for name in source.classes])


class CocoNumbers(nn.Module):
    """COCO's twelve numbers, of boxes and, where model and data have them, of masks; as pycocotools computes them.

    Masks are pasted and encoded image by image, so that memory does not grow with the pictures.
    """

    def __init__(self, description: Description) -> None:
        super().__init__()
        with needs("detect"):
            import pycocotools  # noqa: F401  (before the work)
        self.description = description
        self.seen: list[dict[str, Any]] = []

    def update(self, outputs: list[dict[str, Tensor]], targets: list[dict[str, Any]]) -> None:
        for found, target in zip(outputs, targets, strict=True):
            objects: Objects = target["objects"]
            masks = "masks" in found
            segmentations = [
                run_lengths(s, objects.size) if masks and s is not None else None for s in objects.segmentations
            ]
            bare = [s is None and masks for s in segmentations]
            wanted = _rows(objects.told, objects.labels, segmentations, area=objects.areas, iscrowd=objects.crowd)
            seen = _rows(found["boxes"], found["labels"], pasted(found, objects.size), score=found["scores"])
            for row, without in zip(wanted, bare, strict=True):
                row["bare"] = without
            about = {"name": target["name"], "size": objects.size, "masks": masks}
            self.seen.append(about | {"wanted": wanted, "found": seen})

    def reset(self) -> None:
        self.seen = []

    def compute(self) -> dict[str, float]:
        """The numbers as shares, named box_AP, box_AP50, …, mask_AP, …, and `AP`, which chooses the best weights.

        As pycocotools has it, -1 stands for what there is nothing of.
        """
        figures: dict[str, float] = {}
        images = self.gathered()
        self.seen_names = [image["name"] for image in images]
        self.measured = measure(images, len(self.description.classes))
        for kind, coco in self.measured.items():
            figures |= {f"{kind}_{name}": float(value) for name, value in zip(NUMBERS, coco.stats, strict=True)}
        return {"AP": figures[f"{list(self.measured)[-1]}_AP"]} | figures

    def details(self) -> dict[str, Any]:
        """AP and AP50 of each class that is there, and the images with the most mistakes among sure detections."""
        classes: dict[str, dict[str, float]] = {}
        for kind, coco in self.measured.items():
            precision = coco.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, most detections
            for name, values in zip(self.description.names, np.moveaxis(precision, 2, 0), strict=True):
                if values.max() > -1:
                    found = {f"{kind}_AP": float(values.mean()), f"{kind}_AP50": float(values[0].mean())}
                    classes.setdefault(name, {}).update(found)
        return {"classes": classes, "worst": mistakes(list(self.measured.values())[-1], self.seen_names)[:WORST]}

    def gathered(self) -> list[dict[str, Any]]:
        """What all processes have seen, in order of the names."""
        return sorted((image for part in gathered(self.seen) for image in part), key=lambda image: image["name"])


def _rows(boxes: Any, labels: Any, segmentations: Sequence[Any], **more: Any) -> list[dict[str, Any]]:
    """Annotations in COCO's form, but for their ids and their image's."""
    corners = np.asarray(boxes.cpu() if isinstance(boxes, Tensor) else boxes, np.float64).reshape(-1, 4)
    rows: list[dict[str, Any]] = []
    for i, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        row = {"category_id": int(labels[i]), "bbox": [x0, y0, x1 - x0, y1 - y0]}
        row |= {name: values[i].item() for name, values in more.items()}
        rows.append(
            row | ({"segmentation": segmentations[i]} if segmentations and segmentations[i] is not None else {})
        )
    return rows


def pasted(found: dict[str, Tensor], size: tuple[int, int]) -> list[dict[str, Any]]:
    """The masks of what was found, as run lengths in a picture of `size`; pasted one at a time."""
    if "masks" not in found:
        return []
    masks, boxes = found["masks"].float().cpu(), found["boxes"].float().cpu()
    return [
        encoded(paste_masks_in_image(m[None], b[None], size)[0, 0].numpy() > 0.5)
        for m, b in zip(masks, boxes, strict=True)
    ]


def measure(images: list[dict[str, Any]], classes: int) -> dict[str, Any]:
    """pycocotools' evaluation of each kind: of boxes, and of masks where there are any.

    An object that has a box alone, among others with masks, is no miss of a mask and what is found there is not false:
    for masks its box is a crowd.
    """
    with needs("detect"):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    truth, results = COCO(), COCO()
    sizes = [{"id": i, "height": image["size"][0], "width": image["size"][1]} for i, image in enumerate(images)]
    categories = [{"id": i} for i in range(classes)]
    measured: dict[str, Any] = {}
    for coco, part in ((truth, "wanted"), (results, "found")):
        rows = [row | {"image_id": i} for i, image in enumerate(images) for row in image[part]]
        for number, row in enumerate(rows, 1):  # from 1: an id of 0 means no match there
            row["id"] = number
            row.setdefault("iscrowd", 0)
        coco.dataset = {"images": sizes, "categories": categories, "annotations": rows}
    with redirect_stdout(StringIO()):
        for kind in KINDS:
            wanted = truth.dataset["annotations"]
            if kind == "mask" and (
                not (images and images[0]["masks"]) or (wanted and all(row["bare"] for row in wanted))
            ):
                continue
            for row in wanted if kind == "mask" else []:
                if row["bare"]:
                    x, y, width, height = row["bbox"]
                    row["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                    row["iscrowd"] = 1
            for row in results.dataset["annotations"]:
                row["area"] = area_of(row["segmentation"]) if kind == "mask" else row["bbox"][2] * row["bbox"][3]
            truth.createIndex()
            results.createIndex()
            measured[kind] = evaluated = COCOeval(truth, results, KINDS[kind])
            evaluated.evaluate()
            evaluated.accumulate()
            evaluated.summarize()
    return measured


def mistakes(coco: Any, names: list[str]) -> list[dict[str, Any]]:
    """Objects that were missed, and sure detections (`SURE`) that are none, of each image at an IoU of 0.5; most first."""
    found = {i: {"missed": 0, "false": 0} for i in range(len(names))}
    everything = list(coco.params.areaRng[0])
    for each in coco.evalImgs:
        if each is None or list(each["aRng"]) != everything:
            continue
        sure = {number for number, score in zip(each["dtIds"], each["dtScores"], strict=True) if score >= SURE}
        at_half = zip(each["dtIds"], each["dtMatches"][0], each["dtIgnore"][0], strict=True)
        found[each["image_id"]]["false"] += sum(i in sure and not match and not skip for i, match, skip in at_half)
        wanted = zip(each["gtMatches"][0], each["gtIgnore"], strict=True)
        found[each["image_id"]]["missed"] += sum(match not in sure and not skip for match, skip in wanted)
    rows = [{"image": names[i]} | counts for i, counts in found.items() if any(counts.values())]
    return sorted(rows, key=lambda row: (-row["missed"] - row["false"], row["image"]))


def decode(found: list[dict[str, Tensor]], batch: Batch, description: Description, top: int) -> list[Any]:
    """The `top` surest objects of each image: name, score, box (x, y, width, height), mask, and the data's category id."""
    ids = description.info.get("category_ids") or list(range(len(description.classes)))
    answers = []
    for each, target in zip(found, batch.targets, strict=True):
        surest = {name: value[:top] for name, value in each.items()}
        rows = _rows(surest["boxes"], surest["labels"], pasted(surest, target["size"]), score=surest["scores"])
        answers.append(
            [
                {"label": description.classes[row["category_id"]], "name": description.names[row["category_id"]]}
                | row
                | {"category_id": ids[row["category_id"]]}
                for row in rows
            ]
        )
    return answers


def draw(picture: Image.Image, found: dict[str, Tensor], description: Description) -> dict[str, Image.Image]:
    """The sure objects in the picture: boxes, masks and a legend."""
    sure = {name: value[found["scores"] >= SURE].cpu() for name, value in found.items()}
    width, height = full_size(picture)
    shares = sure["boxes"] / sure["boxes"].new_tensor([width, height, width, height])
    objects = list(zip(sure["labels"].tolist(), sure["scores"].tolist(), shares.tolist(), strict=True))
    masks = [decoded(run_lengths(each, (height, width))) for each in pasted(sure, (height, width))]
    return {"objects": outlined(picture, objects, masks, description.names)}


def collect(rows: list[dict[str, Any]], description: Description) -> dict[str, Any]:
    """The answers for many pictures in COCO's form, with the category ids of the data."""
    ids = description.info.get("category_ids") or list(range(len(description.classes)))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        height, width = row["size"]
        images.append({"id": number, "file_name": row["image"], "height": height, "width": width})
        for answer in row["predictions"]:
            more = {"area": answer["bbox"][2] * answer["bbox"][3], "iscrowd": 0}
            if "segmentation" in answer:
                more["area"] = area_of(answer["segmentation"])
            kept = {name: value for name, value in answer.items() if name != "name"}
            annotations.append({"id": len(annotations) + 1, "image_id": number} | kept | more)
    categories = [{"id": number, "name": name} for number, name in zip(ids, description.classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def tell(answers: list[dict[str, Any]]) -> str:
    """How many of each kind were surely found."""
    sure = [answer["name"] for answer in answers if answer["score"] >= SURE]
    counts = {name: sure.count(name) for name in dict.fromkeys(sure)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or f"nothing of a score of {SURE}"


def table_rows(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The objects as rows of a table."""
    return [
        {"label": a["label"], "name": a["name"], "probability": a["score"]}
        | dict(zip(BOX, a["bbox"], strict=True))
        | ({"mask": json.dumps(a["segmentation"])} if "segmentation" in a else {})
        for a in answers
    ]


def show(figures: dict[str, float]) -> str:
    """The figure that chooses, and AP50 of boxes and masks."""
    more = [f"{kind} AP50 {figures[f'{kind}_AP50']:.3f}" for kind in KINDS if f"{kind}_AP50" in figures]
    return ", ".join([f"AP {figures['AP']:.3f}", *more])


DETECT = Task(
    name="detect",
    about="boxes of objects, and their masks",
    options=DetectOptions,
    open=open_objects,
    build=build,
    start=start,
    prepare=prepare,
    training=training,
    evaluation=Measured,
    align=align,
    collate=padded,
    loss=DetectLoss,
    metrics=CocoNumbers,
    headline="AP",
    curves=("box_AP", "box_AP50", "mask_AP", "mask_AP50"),
    show=show,
    decode=decode,
    tell=tell,
    usual_top=DETECTIONS,
    describe=lambda figures: ", ".join(f"{name} {value:.3f}" for name, value in figures.items()),
    draw=draw,
    sure=SURE,
    collect=collect,
    columns={"label": str, "name": str, "probability": float} | dict.fromkeys(BOX, float) | {"mask": str},
    rows=table_rows,
    forward=forward,
    check=check_objects,
)
