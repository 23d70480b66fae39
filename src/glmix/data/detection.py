"""What `--data` may name for detection: COCO, PASCAL VOC or YOLO, in a folder or tar, or generated scenes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmix.data.coco import annotation_files, scan_coco
from glmix.data.folders import read_tar, walk
from glmix.data.objects import ObjectSource, Record, Row
from glmix.data.samples import DataSet, Several
from glmix.data.scenes import CLASSES, SCENES, SceneSet, run_lengths, scan_scenes
from glmix.data.voc_boxes import is_voc, scan_voc
from glmix.data.yolo import description_file, read_description, scan_yolo
from glmix.errors import UserError

FORMS = ("coco:", "voc:", "yolo:")  # before a name: which form is meant, where a folder holds several


def open_objects(data: str | Path) -> DataSet:
    """The pictures with objects that `data` names.

    Args:
        data: a folder or tar, a JSON file of COCO's form, a data.yaml, or 'scenes'. Of several forms COCO's is taken,
            unless the name begins otherwise: 'voc:DIR'.

    Raises:
        UserError: nothing there, or in none of the forms that are read.
    """
    name = str(data)
    if name == SCENES:
        return scan_scene_objects()
    form = next((form for form in FORMS if name.startswith(form)), "")
    path = Path(name.removeprefix(form))
    if not path.exists():
        raise UserError(f"{path}: no such folder or tar; --data is a set in COCO's, VOC's or YOLO's form")
    if path.is_file() and path.suffix.lower() in (".json", ".yaml", ".yml"):
        root = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        inside = str(path.relative_to(root))
        if path.suffix.lower() == ".json":
            return scan_coco(name, walk(root), [inside])
        content = read_description(name, path.read_bytes())
        place = Path(str(content.get("path") or ""))
        elsewhere = place.is_absolute() and place.is_dir() and not place.resolve().is_relative_to(root.resolve())
        return scan_yolo(name, walk(place if elsewhere else root), path.name if elsewhere else inside, content)
    tree = walk(path) if path.is_dir() else read_tar(path)
    coco = annotation_files(tree) if form in ("", "coco:") else []
    if coco:
        return scan_coco(name, tree, coco)
    described = description_file(tree) if form in ("", "yolo:") else None
    if described:
        return scan_yolo(name, tree, described)
    voc = [n for n in tree.ending_in(".xml") if is_voc(tree, n)] if form in ("", "voc:") else []
    if voc:
        return scan_voc(name, tree, voc)
    raise UserError(
        f"{name}: no objects in {form.rstrip(':').upper() or 'a known'} form; expected COCO's JSON (instances_train.json), "
        "VOC's XML files or YOLO's data.yaml"
        + ("; class folders are for --task classify" if not tree.ending_in(".json", ".xml", ".yaml") else "")
    )


@dataclass(frozen=True)
class SceneRecords:
    """The objects of generated scenes, drawn anew whenever they are asked for."""

    scenes: SceneSet

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Record:
        scene = self.scenes.scene(index)
        size = (self.scenes.side, self.scenes.side)
        masks = [scene.instances == number for number in range(1, len(scene.labels) + 1)]
        return Record(
            size,
            [
                Row(label, box, False, float(mask.sum()), {"size": list(size), "counts": run_lengths(mask)}, number)
                for number, (label, box, mask) in enumerate(
                    zip(scene.labels.tolist(), scene.boxes.tolist(), masks, strict=True), 1
                )
            ],
        )

    def size(self, index: int) -> int:
        return 0


def scan_scene_objects() -> DataSet:
    """The scenes of both splits, with boxes and masks of their objects."""
    labelled = scan_scenes()
    pictures: Any = labelled.whole.pictures
    records: list[tuple[Any, int]] = [(SceneRecords(scenes), i) for scenes, i in pictures.places]
    files = [f"{split}/{labelled.whole.files[i]}" for split, indices in labelled.named.items() for i in indices]
    numbers = list(range(1, len(CLASSES) + 1))
    whole = ObjectSource(files, pictures, Several(records), list(CLASSES), numbers)
    return DataSet(SCENES, whole, labelled.named, least_classes=1)
