"""Images with a mask of their objects: a folder in PASCAL VOC's layout, or generated scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glmix.data.folders import FolderPictures, is_rubbish
from glmix.data.images import BadImage
from glmix.data.samples import Sample, Source
from glmix.data.scenes import SCENES, SceneSet, scene_split
from glmix.errors import UserError

VOID = 255  # in a mask: neither object nor background
Mask = NDArray[np.uint8]  # (H, W): 0 background, 1 and on its objects, VOID


@dataclass(frozen=True)
class MaskedSource(Source):
    """Images whose targets are masks of their objects (`Mask`)."""

    def read(self, index: int) -> Sample:
        """The image at `index`, and its mask.

        Raises:
            BadImage: either cannot be read, or they differ in size.
        """
        sample = super().read(index)
        image, mask = sample.image, sample.target
        if mask.shape != (image.height, image.width):
            raise BadImage(self.files[index], "the mask's size is not the image's")
        return sample


@dataclass(frozen=True)
class MaskFiles:
    """Masks in image files whose pixels are numbers of objects, or indices of a palette."""

    root: Path
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Mask:
        path = self.root / self.paths[index]
        try:
            with Image.open(path) as file:
                mask = np.array(file)
        except Exception as error:  # Pillow's decoders raise nearly every kind on damaged files
            raise BadImage(str(path), (str(error) or type(error).__name__).splitlines()[0][:100]) from error
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise BadImage(str(path), "no mask of one channel of 8 bits")
        return mask


@dataclass(frozen=True)
class SceneMasks:
    """The masks of generated scenes."""

    scenes: SceneSet

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Mask:
        return self.scenes.scene(index).instances


def open_masks(source: str, split: str = "val") -> Source:
    """The images of `source` with masks: 'scenes', or a folder in VOC's layout (or one that holds such a folder).

    Raises:
        UserError: neither.
    """
    if source == SCENES:
        usual = scene_split(split)
        return MaskedSource(usual.files, usual.pictures, SceneMasks(usual.pictures), [])
    root = Path(source)
    inside = [root, *sorted(root.glob("*")), *sorted(root.glob("VOCdevkit/*"))] if root.is_dir() else []
    found = next((p for p in inside if (p / "SegmentationObject").is_dir() and (p / "JPEGImages").is_dir()), None)
    if found is None:
        raise UserError(
            f"{source}: no folder in PASCAL VOC's layout (JPEGImages/, SegmentationObject/, ImageSets/Segmentation/{split}.txt)"
            + ("; unpack the tar first" if root.is_file() else "; or use --data scenes")
        )
    listed = found / "ImageSets" / "Segmentation" / f"{split}.txt"
    if listed.is_file():
        names = listed.read_text().split()
    else:
        names = sorted(p.stem for p in (found / "SegmentationObject").glob("*.png") if not is_rubbish(p.name))
    if not names:
        raise UserError(f"{listed if listed.is_file() else found / 'SegmentationObject'}: no images named there")
    pictures = FolderPictures(found / "JPEGImages", [f"{name}.jpg" for name in names])
    return MaskedSource(names, pictures, MaskFiles(found / "SegmentationObject", [f"{name}.png" for name in names]), [])
