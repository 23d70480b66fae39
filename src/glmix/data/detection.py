"""What `--data` may name for detection: COCO, PASCAL VOC or YOLO, in a folder or tar, or generated scenes."""

from pathlib import Path, PurePosixPath

from glmix.data.coco import annotation_files, scan_coco
from glmix.data.folders import Tree, read_tar, walk
from glmix.data.samples import DataSet
from glmix.errors import UserError


def open_objects(data: str | Path) -> DataSet:
    """The pictures with objects that `data` names.

    Raises:
        UserError: nothing there, or in none of the forms that are read.
    """
    name, path = str(data), Path(data)
    if path.is_file() and path.suffix.lower() == ".json":
        root = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        return scan_coco(name, walk(root), [str(PurePosixPath(path.relative_to(root)))])
    if not path.exists():
        raise UserError(f"{name}: no such folder or tar; --data is a set in COCO's, VOC's or YOLO's form")
    tree: Tree = walk(path) if path.is_dir() else read_tar(path)
    found = annotation_files(tree)
    if found:
        return scan_coco(name, tree, found)
    raise UserError(f"{name}: no COCO JSON")
